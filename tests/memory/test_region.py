"""A region is exact, aligned, charged while it lives, page-locked between touch and unmapping, and never unmapped under
a view."""

import gc
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.errors import BudgetError, InternalError
from offload.memory import region as region_module
from offload.memory.ledger import Ledger
from offload.memory.region import Region, bits, typed
from offload.units import MIB, Tier


class Registrations:
    """Records what is page-locked; optionally refuses."""

    def __init__(self, error: Exception | None = None) -> None:
        self.live: list[tuple[int, int]] = []
        self.num_undone = 0
        self._error = error

    def __call__(self, address: int, num_bytes: int) -> Callable[[], None]:
        if self._error is not None:
            raise self._error
        self.live.append((address, num_bytes))

        def undo() -> None:
            self.live.remove((address, num_bytes))
            self.num_undone += 1

        return undo


@pytest.fixture
def ledger() -> Ledger:
    return Ledger({Tier.HOST: 64 * MIB})


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, 2 * MIB, 5 * MIB + 12345])
def test_a_region_has_exactly_its_bytes_page_aligned_and_zero(ledger: Ledger, num_bytes: int) -> None:
    with Region(num_bytes, owner="weights", ledger=ledger) as region:
        assert (region.tensor.dtype, tuple(region.tensor.shape)) == (torch.uint8, (num_bytes,))
        assert region.address == region.tensor.data_ptr()
        assert region.address % 4096 == 0
        assert not region.tensor.any()
        region.tensor.fill_(7)  # writable to the last byte
        assert ledger.held(Tier.HOST) == num_bytes
    assert ledger.held(Tier.HOST) == 0


def test_an_empty_region_maps_and_registers_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_module, "map_anonymous", None)
    registrations = Registrations()
    with Region(0, owner="weights", ledger=ledger, register=registrations) as region:
        assert (region.tensor.numel(), region.address, region.num_bytes) == (0, 0, 0)
        assert not registrations.live
    with pytest.raises(InternalError, match="closed"):
        _ = region.tensor


def test_memory_is_touched_before_it_is_page_locked(ledger: Ledger) -> None:
    resident = []

    def register(address: int, num_bytes: int) -> Callable[[], None]:
        resident.append(_resident_bytes(address))
        return lambda: None

    Region(3 * MIB, owner="weights", ledger=ledger, register=register).close()
    assert resident[0] >= 3 * MIB


def test_page_locking_covers_the_exact_size_and_is_undone_before_unmapping(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    mappings: list[mmap.mmap] = []
    original = region_module.map_anonymous

    def wrapped(num_bytes: int) -> mmap.mmap:
        mappings.append(original(num_bytes))
        return mappings[-1]

    monkeypatch.setattr(region_module, "map_anonymous", wrapped)
    open_when_undone = []
    seen = []

    def register(address: int, num_bytes: int) -> Callable[[], None]:
        seen.append((address, num_bytes))
        return lambda: open_when_undone.append(not mappings[0].closed)

    region = Region(10_000, owner="weights", ledger=ledger, register=register)
    assert seen == [(region.address, 10_000)]
    assert len(mappings[0]) == 12_288  # whole pages
    region.close()
    assert open_when_undone == [True]
    assert mappings[0].closed


def test_a_second_close_does_nothing(ledger: Ledger) -> None:
    registrations = Registrations()
    region = Region(4096, owner="weights", ledger=ledger, register=registrations)
    region.close()
    region.close()
    assert (registrations.live, registrations.num_undone, ledger.held(Tier.HOST)) == ([], 1, 0)
    with pytest.raises(InternalError, match="used after it was closed"):
        _ = region.tensor


def test_closing_under_a_live_view_raises_keeps_the_view_valid_and_leaks_no_charge(ledger: Ledger) -> None:
    registrations = Registrations()
    region = Region(8192, owner="weights", ledger=ledger, register=registrations)
    view = typed(region.tensor, torch.float32)[3:9]
    view.fill_(2.5)
    with pytest.raises(InternalError, match="views of it are alive"):
        region.close()
    region.close()
    assert view.tolist() == [2.5] * 6
    assert (registrations.live, ledger.held(Tier.HOST)) == ([], 0)


def test_a_region_that_is_dropped_is_unlocked_and_discharged(ledger: Ledger) -> None:
    registrations = Registrations()
    region = Region(8192, owner="weights", ledger=ledger, register=registrations)
    del region
    gc.collect()
    assert (registrations.live, registrations.num_undone, ledger.held(Tier.HOST)) == ([], 1, 0)


def test_a_refused_page_lock_leaves_nothing_behind(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    mappings: list[mmap.mmap] = []
    original = region_module.map_anonymous
    monkeypatch.setattr(
        region_module, "map_anonymous", lambda num_bytes: mappings.append(original(num_bytes)) or mappings[-1]
    )
    with pytest.raises(RuntimeError, match="out of lockable memory"):
        Region(8192, owner="w", ledger=ledger, register=Registrations(RuntimeError("out of lockable memory")))
    assert ledger.held(Tier.HOST) == 0
    assert mappings[0].closed


def test_a_size_the_machine_cannot_map_raises_a_budget_error() -> None:
    ledger = Ledger({})
    with pytest.raises(BudgetError, match="'weights' could not map"):
        Region(2**60, owner="weights", ledger=ledger)
    assert ledger.held(Tier.HOST) == 0


def test_nothing_is_mapped_over_the_budget(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_module, "map_anonymous", None)
    with pytest.raises(InternalError, match="budget"):
        Region(65 * MIB, owner="weights", ledger=ledger)
    assert ledger.held(Tier.HOST) == 0


def test_an_unsupported_advice_is_tolerated(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_module, "_ADVICE", ("MADV_NOT_THERE", "MADV_REMOVE"))  # the second raises EINVAL
    Region(8192, owner="weights", ledger=ledger).close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_typed_shows_the_same_memory(ledger: Ledger, dtype: torch.dtype) -> None:
    with Region(4096, owner="weights", ledger=ledger) as region:
        elements = typed(region.tensor[256:512], dtype)
        assert elements.data_ptr() == region.address + 256
        assert elements.numel() == 256 // dtype.itemsize
        del elements


def test_typed_refuses_what_cannot_be_seen_so() -> None:
    byte_run = torch.zeros(64, dtype=torch.uint8)
    for wrong in (byte_run[:7], byte_run[1:5], byte_run.view(8, 8), byte_run[::2], byte_run.view(torch.int8)):
        with pytest.raises(InternalError):
            typed(wrong, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "seen_as"),
    [
        (torch.float32, np.float32),
        (torch.bfloat16, np.uint16),
        (torch.float16, np.uint16),
        (torch.uint8, np.uint8),
        (torch.int8, np.int8),
    ],
)
def test_bits_shows_the_same_memory_as_kernels_take_it(dtype: torch.dtype, seen_as: type) -> None:
    tensor = torch.ones(8, dtype=torch.float32).to(dtype)
    array = bits(tensor)
    assert array.dtype == seen_as
    assert array.ctypes.data == tensor.data_ptr()
    array[2] = 0
    assert tensor[2] == 0


def test_bits_of_bf16_are_its_upper_half_and_parameters_are_accepted() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    assert bits(parameter).tolist() == [0x3F80, 0xC000]


def test_bits_refuses_other_kinds() -> None:
    for wrong in (torch.zeros(1, dtype=torch.int64), torch.empty(1, device="meta")):
        with pytest.raises(InternalError):
            bits(wrong)


def _resident_bytes(address: int) -> int:
    """Rss of the mapping that holds `address`, from smaps."""
    inside = False
    with Path("/proc/self/smaps").open() as lines:
        for line in lines:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(part, 16) for part in first.split("-"))
                inside = begin <= address < end
            elif inside and first == "Rss:":
                return int(line.split()[1]) * 1024
    return 0
