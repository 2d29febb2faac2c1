"""What the benchmarks for accelerators ask of each row and what they compute without one."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.gpu import capacity
from offload.units import GIB

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))  # as where its scripts run
    return importlib.import_module("rows")


def test_names_of_rows_are_unique_and_every_set_has_some(rows: ModuleType) -> None:
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)
    assert {name for row in rows.ROWS for name in row.sets} == set(rows.SETS)


def test_our_budget_and_the_activations_fit_the_cap(rows: ModuleType) -> None:
    for row in rows.ROWS:
        order = rows.order_for(row, device="cuda", params=None, tokens=None)
        if row.engine == "offload":
            activations = rows.activation_bytes(order["params"], order["tokens"])
            assert order["device_bytes"] + activations == order["cap_bytes"]
            assert order["device_bytes"] > 0


def test_the_caps_force_off_the_device_what_they_say(rows: ModuleType) -> None:
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
