"""`offload bench overlap`: what its result holds, how bound and serial time are made, what the emulated parts do, and
what it says to arguments that it cannot use. No test looks at how quick anything was."""

import json
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from benchmarks.commands.overlap import ROWS, RowNames, row_figures
from benchmarks.commands.overlap_rig import OverlapRig, Setting, StepParts, mean_of
from benchmarks.commands.timed_model import GRADIENT, PARAMETERS_PER_BLOCK, make_model
from offload.cli.exit_codes import UNUSABLE
from offload.cli.main import main
from offload.units import Tier

NUMEL = 12 * 1280
BLOCKS = 8
ROUNDS = 2
PARTITIONS = (3, 5)
SHARES = {0.3, 0.6, 0.9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    code = main(
        ["bench", "overlap", "--numel", str(NUMEL), "--blocks", str(BLOCKS), "--rounds", str(ROUNDS), "--seed", "5",
         "--partitions", *map(str, PARTITIONS), "--json", str(folder / "overlap.json")]
    )  # fmt: skip
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict:
    return json.loads((folder / "overlap.json").read_text())


# -------------------------------------------------------------------------------------------------- the result


def test_every_pair_of_shares_has_one_row(result: dict) -> None:
    pairs = [(row["transfer_share"], row["optimizer_share"]) for row in result["rows"]]
    assert sorted(pairs) == sorted((a, b) for a in SHARES for b in SHARES)


def test_the_ratios_of_a_row_are_medians_of_those_of_its_rounds(result: dict) -> None:
    for row in result["rows"]:
        for ratio in ("step_vs_max", "serial_vs_max"):
            assert len(row[f"{ratio}_samples"]) == ROUNDS
            assert row[ratio] == pytest.approx(statistics.median(row[f"{ratio}_samples"]))
    for row, names in zip(result["rows"], ROWS, strict=True):
        assert row["step_s"] == pytest.approx(statistics.median(result["samples"][names.step]))
        assert row["compute_s"] == pytest.approx(statistics.median(result["samples"][names.compute]))


def test_the_link_is_as_slow_as_its_share_of_compute_asks(result: dict) -> None:
    for row in result["rows"]:
        forward_s = result["forward_s"][str(row["optimizer_share"])]
        assert row["h2d_block_s"] == pytest.approx(row["transfer_share"] * forward_s)
        # gradients cross it once; weights twice, less those that are still there when backward begins
        assert row["d2h_s"] == pytest.approx(BLOCKS * row["d2h_block_s"])
        assert BLOCKS * row["h2d_block_s"] < row["h2d_s"] * 1.001 <= 2.001 * BLOCKS * row["h2d_block_s"]
        assert forward_s == pytest.approx(result["calibrated_optimizer_s"] / row["optimizer_share"] / BLOCKS)


def test_every_number_of_partitions_has_the_cost_of_both_phases(result: dict) -> None:
    assert result["per_partition_us"].keys() == {str(count) for count in PARTITIONS}
    for count, costs in result["per_partition_us"].items():
        for phase in ("forward", "backward", "forward_cpu", "backward_cpu"):
            samples = result["per_partition_samples_us"][count][phase]
            assert len(samples) == ROUNDS
            assert costs[phase] == pytest.approx(statistics.median(samples))


def test_everything_that_is_emulated_is_labelled_so(result: dict, folder: Path) -> None:
    assert result["emulated"].startswith("emulated:")
    assert result["emulated"] in (folder / "overlap.svg").read_text()
    assert result["benchmark"] == "overlap"
    assert result["seeds"] == {"torch": 5}
    assert result["kernel_threads"] >= 1
    assert str(folder) not in json.dumps(result)


def test_a_row_tells_what_compute_waited_for(result: dict) -> None:
    for row in result["rows"]:
        assert {"compute", "h2d", "d2h", "step"} <= row["lanes"].keys()
        for share in row["lanes"].values():
            assert share.keys() == {"busy_s", "exposed_s", "overlapped_s"}
            assert 0.0 <= share["overlapped_s"] <= share["busy_s"] * 1.001


def test_the_chart_has_a_bar_for_the_step_and_one_for_the_serial_sum_of_every_row(folder: Path) -> None:
    root = ElementTree.parse(folder / "overlap.svg").getroot()
    assert len(root.findall(".//{http://www.w3.org/2000/svg}rect[@class='bar']")) == 2 * len(ROWS)


# --------------------------------------------------------------------------------------------------- the figures


def test_the_bound_is_the_longest_part_and_one_block_of_each_that_cannot_overlap() -> None:
    parts = StepParts(
        step_s=12.0, h2d_s=8.0, d2h_s=4.0, optimizer_s=5.0, h2d_block_s=0.2, d2h_block_s=0.3, optimizer_block_s=0.5
    )
    assert parts.bound_s(compute_s=10.0) == pytest.approx(11.0)
    assert parts.bound_s(compute_s=1.0) == pytest.approx(9.0)
    assert parts.serial_s(compute_s=10.0) == pytest.approx(27.0)
    figures = row_figures(RowNames(0.3, 0.9), [10.0, 1.0, 10.0], [parts] * 3)
    assert figures["step_vs_max"] == pytest.approx(12 / 11)
    assert figures["serial_vs_max"] == pytest.approx(27 / 11)
    assert figures["measured_transfer_share"] == pytest.approx(0.8)
    assert figures["measured_optimizer_share"] == pytest.approx(1.0)
    assert mean_of([parts, parts]) == parts


# ---------------------------------------------------------------------------------------------------- the rig


def test_the_session_streams_everything_and_trains_every_parameter() -> None:
    rig = OverlapRig(blocks=4, numel=NUMEL, seed=0)
    try:
        homes = rig.session.plan.bytes_by_kind_and_tier
        assert all(by_tier[Tier.DEVICE] == by_tier[Tier.DISK] == 0 for by_tier in homes.values())
        rig.emulate(Setting(forward_s=1e-4, transfer_share=0.5))
        rig._steps(2)
        with rig.session.gathered() as masters:
            moved = {name: master.clone() for name, master in masters.items()}
        assert len(moved) == 4 * PARAMETERS_PER_BLOCK
        assert all(bool((master < 0).all()) for master in moved.values())  # equal gradients above 0, from weights of 0
    finally:
        rig.close()


def test_every_parameter_of_the_model_has_a_gradient_of_full_size() -> None:
    model = make_model(2, NUMEL)
    model(torch.zeros(8)).sum().backward()
    assert sum(p.numel() for p in model.parameters()) == 2 * NUMEL
    assert all(torch.equal(p.grad, torch.full_like(p, GRADIENT)) for p in model.parameters())


# --------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--numel", "0"], "--numel"),
        (["--numel", "1000"], "256 bytes"),
        (["--blocks", "x"], "--blocks"),
        (["--blocks", "999999999"], "memory"),
        (["--partitions", "0"], "--partitions"),
        (["--rounds", "0"], "--rounds"),
        (["--json", "/nowhere/overlap.json"], "--json"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", "overlap", *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == UNUSABLE
    assert out == ""
    assert err.count("\n") == 1
    assert "error:" in err
    assert names in err
