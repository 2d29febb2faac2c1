"""What the benchmarks for accelerators ask of each row and what they compute without one."""

import dataclasses
import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks.gpu import capacity, rows
from offload.config import make_config
from offload.enable import check_model, make_plan, partition_model, settings_for
from offload.optimizer.kinds import kind_of
from offload.units import GIB, Tier

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))  # as in the process of a row, which knows nothing of ours
    return importlib.import_module("llama")


def test_names_of_rows_are_unique_and_every_set_has_some() -> None:
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)
    assert {name for row in rows.ROWS for name in row.sets} == set(rows.SETS)


def test_our_budget_and_the_activations_fit_the_cap() -> None:
    for row in rows.ROWS:
        order = rows.order_for(row, device="cuda", params=None, tokens=None)
        if row.engine == "offload":
            activations = rows.activation_bytes(order["params"], order["tokens"])
            assert 0 < order["device_bytes"] <= order["cap_bytes"] - activations
            assert (order["device_bytes"] == order["cap_bytes"] - activations) != bool(order.get("state_off"))


def test_state_is_where_a_row_says(llama: ModuleType) -> None:
    """Scenario: a row that measures the disk, whose plan keeps all state on the device and the host."""
    device = SimpleNamespace(is_host=False, slots_share_a_block=True)
    with torch.device("meta"):
        model = llama.Losses("3b").to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    kind = kind_of(optimizer, "fp32")
    partitions = partition_model(model, check_model(model, optimizer), itemsize=2, align_numel=kind.align_numel)
    for row in rows.ROWS:
        order = rows.order_for(row, device="cuda", params=None, tokens=None)
        if order.get("state_off"):
            config = make_config(
                device_memory=order["device_bytes"], host_memory=order["host_bytes"] or 110 * GIB, disk=None,
                disk_space=None, precision="bf16", max_grad_norm=1.0, accumulate=1, wait_timeout_s=600.0,
            )  # fmt: skip
            config = dataclasses.replace(config, disk_bytes=60 * GIB)
            homes = make_plan(partitions, config, device, kind, settings_for((), checksum=False))  # type: ignore[arg-type]
            by_tier = homes.bytes_by_kind_and_tier["state"]
            there = Tier.DISK if order.get("state_on_disk") else Tier.HOST
            assert by_tier[there] > 0.95 * sum(by_tier.values()), (row.name, by_tier)
            assert homes.bytes_by_kind_and_tier["weights"][Tier.DEVICE] >= 2 * llama.num_parameters(model)


def test_the_caps_force_off_the_device_what_they_say() -> None:
    parameters, tokens = rows.PARAMETERS["3b"], rows.LENGTHS["16k"]
    activations = rows.activation_bytes("3b", tokens)
    assert 14 * parameters + activations > rows.CAPS["state"] > 4 * parameters + activations
    assert 2 * parameters + activations > rows.CAPS["weights"]


@pytest.mark.parametrize("cap", capacity.CAPS)
def test_the_largest_model_fits_and_the_next_does_not(cap: int) -> None:
    machine = capacity.Machine(64 * GIB, 1024 * GIB)
    for peer in capacity.PEERS:
        found = capacity.largest(lambda model, p=peer: capacity.peer_bound(p, model, cap, machine))
        assert found.numel > 0
        assert capacity.peer_bound(peer, capacity.Llama(found.width), cap, machine) == ""
        assert capacity.peer_bound(peer, capacity.Llama(found.width + 128), cap, machine) == found.bound != ""


def test_ours_is_bound_by_the_budget_that_is_too_small() -> None:
    seven = capacity.Llama(4096)
    assert seven.numel == pytest.approx(6.8e9, rel=0.02)
    assert capacity.our_bound(seven, 16 * GIB, capacity.Machine(120 * GIB, 0), "fp32") == ""
    assert capacity.our_bound(seven, 16 * GIB, capacity.Machine(40 * GIB, 0), "fp32") == "host"
    assert capacity.our_bound(seven, GIB, capacity.Machine(120 * GIB, 0), "fp32").startswith("device")
