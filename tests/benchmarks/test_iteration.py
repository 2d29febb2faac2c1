"""Iterations beside plain torch: budgets that lead to a layout, ratios, targets, what an absent contender leaves; one
tiny run of all contenders that need no more than torch."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.iteration import __main__ as program
from benchmarks.iteration.layouts import DEVICE, DISK, DISK_STATE, HOST, HOST_STATE, planned_as
from benchmarks.iteration.rows import Case, chart_of, compared, comparison_table, grown, growth_met, growth_table
from benchmarks.iteration.worker import FSDP2, OURS, PLAIN, TIMES, iterations_for
from offload.planning.planner import KINDS, Budgets, Encoding, PartitionSizes, Plan, plan
from offload.units import BLOCK_NUMEL, Tier

STATE = (("master", 4), ("exp_avg", 4), ("exp_avg_sq", 4))
ENCODING = Encoding(
    weight_itemsize=2, wire_itemsize=2, gradient_itemsize=2, state_tensors=STATE, resident_state_tensors=STATE,
    whole_partitions=False, device_workspace_itemsize=0,
)  # fmt: skip


def planned(device_bytes: int, host_bytes: int) -> Plan:
    """Of twenty equal partitions of four chunks each."""
    sizes = [
        PartitionSizes(id=number, name=str(number), trainable_numel=4 * BLOCK_NUMEL, frozen_numel=0, held_with=(),
                       build_bytes=0)
        for number in range(20)
    ]  # fmt: skip
    return plan(sizes, ENCODING, Budgets(device_bytes, host_bytes, 1 << 60), device_state=True)


def tiers(layout: str) -> dict[str, set[Tier]]:
    """Where `layout` has bytes of each kind."""
    homes = planned_as(layout, planned).bytes_by_kind_and_tier
    return {kind: {tier for tier in Tier if homes[kind][tier]} for kind in KINDS}


def test_every_layout_has_each_kind_of_bytes_on_one_tier() -> None:
    device, host, disk = {Tier.DEVICE}, {Tier.HOST}, {Tier.DISK}
    assert tiers(DEVICE) == {"weights": device, "gradients": device, "state": device}
    assert tiers(HOST_STATE) == {"weights": device, "gradients": host, "state": host}
    assert tiers(DISK_STATE) == {"weights": device, "gradients": host, "state": disk}
    assert tiers(HOST) == {"weights": host, "gradients": host, "state": host}
    assert tiers(DISK) == {"weights": disk, "gradients": disk, "state": disk}


# ------------------------------------------------------------------------------------------------------- figures


def answer(ours_s: float, contender: str = OURS) -> dict[str, Any]:
    """Two rounds, the second on a machine that is twice as slow."""
    samples = {PLAIN: [1.0, 2.0], "fused": [0.5, 1.0], contender: [ours_s, 2 * ours_s]}
    return {
        "layout": DEVICE, "tokens": 300, "train": {"iterations": 3, "samples_s": samples},
        "forward": {"iterations": 9, "samples_s": samples},
    }  # fmt: skip


def test_ratios_are_those_of_rounds_and_a_target_is_met_by_the_median() -> None:
    row = compared(Case("tiny", "fp32", OURS, DEVICE), answer(1.25))
    assert row["train"]["ratio"] == {"median": 1.25, "lowest": 1.25, "highest": 1.25}
    assert row["train"]["ratio_to_fused"]["median"] == 2.5
    assert row["forward"]["tokens_per_s"][OURS] == pytest.approx(300 / 1.875)
    assert (row["target"], row["met"]) == (1.5, True)
    assert compared(Case("tiny", "fp32", OURS, DEVICE), answer(1.75))["met"] is False


def test_a_peer_has_no_target_and_an_absent_one_says_why() -> None:
    here = compared(Case("tiny", "fp32", FSDP2, HOST), answer(4.0, FSDP2))
    absent = compared(Case("tiny", "fp32", FSDP2, HOST), {"absent": "no result in 600 s"})
    assert "met" not in here
    for text in (comparison_table([here, absent], "train"), chart_of([here, absent], "title")):
        assert "no result in 600 s" in text
        assert "4.00" in text


def growth(count: int, forward_us: float) -> dict[str, Any]:
    """A row of a model whose hooks cost that much forward, and half of it in every other phase."""
    plain = {phase: [0.001 * count] for phase in TIMES}
    ours = {p: [0.001 * count + forward_us * count / 1e6 / (1 if p.startswith("forward") else 2)] for p in plain}
    return grown(count, 768, DEVICE, {
        "samples_s": {PLAIN: plain, OURS: ours}, "partitions": count, "enable_s": 1.0, "close_s": 1.0,
        "load_average_1m": 0.0,
    })  # fmt: skip


def test_hooks_are_judged_by_block_and_a_number_of_blocks_without_a_result_fails() -> None:
    good, slow = growth(10, 50.0), growth(100, 70.0)
    absent = grown(5000, 768, DEVICE, {"absent": "no result in 600 s"})
    assert good["more_us_per_block"]["forward"] == pytest.approx(50.0)
    assert growth_met([good]) == {"forward_us": True, "backward_us": True, "enable_s": True}
    assert growth_met([good, slow]) == {"forward_us": False, "backward_us": True, "enable_s": True}
    assert not any(growth_met([good, absent]).values())
    assert "no result in 600 s" in growth_table([good, absent])


def test_a_block_takes_its_time_within_limits() -> None:
    assert [iterations_for(once_s, 1.0) for once_s in (0.3, 10.0, 1e-6)] == [4, 2, 200]


# ----------------------------------------------------------------------------------------------------- one run


def test_a_quick_run_has_a_row_for_every_contender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "iteration.json"
    arguments = [
        "--disk", tmp_path, "--quick", "--parts", "compare", "--subjects", "tiny", "--precisions", "fp32", "--rounds",
        "1", "--layouts", DEVICE, HOST, "--json", out,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["iteration", *map(str, arguments)])
    monkeypatch.setattr(program, "find_deepspeed", lambda python: program.Unavailable("not installed here"))
    assert program.main() == 0
    result = json.loads(out.read_text())
    rows = {(row["contender"], row["layout"]): row for row in result["rows"]}
    assert rows.keys() == {(OURS, DEVICE), (OURS, HOST), (FSDP2, HOST), ("deepspeed", DEVICE)}
    assert rows["deepspeed", DEVICE]["absent"] == "not installed here"
    for row in (rows[OURS, DEVICE], rows[OURS, HOST], rows[FSDP2, HOST]):
        assert len(row["train"]["samples_s"][row["contender"]]) == 1, row.get("absent")
        losses = row["last_losses"]
        assert losses[row["contender"]] == pytest.approx(losses[PLAIN], rel=1e-3)
    assert result["machine"]["vector_features"] is not None
