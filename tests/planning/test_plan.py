"""The plan: homes and rings within budgets, exact totals, and the error that names the smallest budgets."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planning.planner import KINDS, Budgets, Encoding, PartitionSizes, Plan, plan
from offload.planning.rings import MOST_STEP_BUFFERS
from offload.units import BLOCK_NUMEL, GIB, MAX_CHUNK_NUMEL, MIB, Tier
from tests.doubles.smallest_rings import plan_smallest

FP32 = Encoding(4, 4, 4, (("master", 4), ("exp_avg", 4), ("exp_avg_sq", 4)))
BF16 = Encoding(2, 2, 4, FP32.state_tensors)
BLOCKS = [PartitionSizes(i, f"block {i}", 3_000_000 + 64 * i, 0) for i in range(8)]
DISK = 100 * GIB


def make(
    device: int | None, host: int | None, disk: int = DISK, sizes: list[PartitionSizes] = BLOCKS, **more: bool
) -> Plan:
    return plan(sizes, BF16, Budgets(device, host, disk), device_state=more.pop("device_state", True), **more)


def test_with_room_on_the_device_nothing_streams() -> None:
    made = make(8 * GIB, 8 * GIB)
    assert (made.slot_ring_bytes, made.step_buffers, made.offload_buffers, made.host_bytes, made.disk_bytes) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert all(set(homes.state) | set(homes.gradients) == {Tier.DEVICE} for homes in made.homes)


def test_with_room_on_the_host_nothing_goes_to_disk() -> None:
    made = make(40 * MIB, 8 * GIB)
    assert made.disk_bytes == 0
    assert made.weight_buffers == 0
    assert made.slot_ring_bytes > 0


def test_weights_take_the_host_before_gradients_and_state() -> None:
    made = make(40 * MIB, 200 * MIB)
    by_kind = made.bytes_by_kind_and_tier
    assert by_kind["weights"][Tier.DISK] == 0
    assert by_kind["state"][Tier.DISK] > 0


@settings(deadline=None, max_examples=60)
@given(
    device=st.integers(13 * MIB, 600 * MIB),
    host=st.integers(6 * MIB, 700 * MIB),
    encoding=st.sampled_from([FP32, BF16]),
)
def test_every_tier_stays_within_its_budget_and_nothing_is_lost(device: int, host: int, encoding: Encoding) -> None:
    try:
        made = plan(BLOCKS, encoding, Budgets(device, host, DISK), device_state=True)
    except BudgetError:
        return
    assert made.device_bytes <= device
    assert made.host_bytes <= host
    assert made.chunk_numel % BLOCK_NUMEL == 0
    for kind, itemsize in (
        ("weights", encoding.weight_itemsize),
        ("gradients", encoding.gradient_itemsize),
        ("state", 12),
    ):
        elements = sum(p.trainable_numel for p in BLOCKS)
        assert elements * itemsize <= sum(made.bytes_by_kind_and_tier[kind].values()) < elements * itemsize + 10 * MIB
    for homes in made.homes:
        for gradient, state in zip(homes.gradients, homes.state, strict=True):
            assert (gradient is Tier.DEVICE) == (state is Tier.DEVICE)


@settings(deadline=None, max_examples=30)
@given(host=st.integers(60 * MIB, 400 * MIB))
def test_more_host_memory_never_means_more_on_disk_at_one_chunk_size(host: int) -> None:
    small, large = make(40 * MIB, host), make(40 * MIB, host + 16 * MIB)
    if small.chunk_numel == large.chunk_numel:
        assert large.disk_bytes <= small.disk_bytes


def test_the_error_names_budgets_that_do() -> None:
    with pytest.raises(BudgetError) as caught:
        make(1 * MIB, 1 * MIB)
    device, host = (int(n) for n in re.findall(r"is (\d+) bytes", str(caught.value)))
    made = make(device, host)
    assert made.device_bytes <= device
    assert made.host_bytes <= host
    with pytest.raises(BudgetError):
        make(device - 1, GIB)
    with pytest.raises(BudgetError):
        make(device, host - 4096)


def test_without_a_disk_everything_must_fit() -> None:
    with pytest.raises(BudgetError, match="give disk="):
        make(40 * MIB, 100 * MIB, disk=0)


def test_a_disk_that_is_too_small_is_refused() -> None:
    with pytest.raises(BudgetError):
        make(40 * MIB, 60 * MIB, disk=10 * MIB)


def test_partitions_held_together_have_room_together() -> None:
    outer = PartitionSizes(0, "outer", 1_000_000, 0)
    inner = [PartitionSizes(i, f"inner {i}", 2_000_000, 0, held_with=(0,)) for i in (1, 2, 3)]
    gradient_slot, slots = 4_000_256, 2_000_000 + 4_000_000
    made = plan([outer, *inner], BF16, Budgets(gradient_slot + slots, None, 0), device_state=False)
    assert made.device_bytes == gradient_slot + slots
    with pytest.raises(BudgetError):
        plan([outer, *inner], BF16, Budgets(gradient_slot + slots - 1, None, 0), device_state=False)


def test_frozen_partitions_have_weights_alone() -> None:
    made = plan([PartitionSizes(0, "frozen", 0, 5_000_000)], BF16, Budgets(MIB * 12, GIB, 0), device_state=False)
    assert made.gradient_slot_bytes == 0
    assert made.homes[0].state == ()


@pytest.mark.parametrize("plan_of_sizes", [plan, plan_smallest])
@pytest.mark.parametrize("device", [40 * MIB, 8 * GIB])
def test_where_parameters_are_stepped_whole_the_largest_partition_is_one_chunk(
    device: int, plan_of_sizes: Callable[..., Plan]
) -> None:
    whole = replace(BF16, whole_partitions=True)
    made = plan_of_sizes(BLOCKS, whole, Budgets(device, 8 * GIB, DISK), device_state=False)
    assert made.chunk_numel >= max(block.trainable_numel for block in BLOCKS) > MAX_CHUNK_NUMEL
    assert all(len(homes.state) == len(homes.gradients) == 1 for homes in made.homes)


def test_disks_that_want_more_under_way_get_more_buffers_to_step_in() -> None:
    sizes = [PartitionSizes(i, f"block {i}", 3_000_000, 0) for i in range(20)]
    budgets = Budgets(40 * MIB, 800 * MIB, DISK)
    slow, fast = (plan(sizes, BF16, budgets, device_state=False, in_flight_bytes=n) for n in (0, 64 * MIB))
    assert slow.disk_bytes > 0
    assert fast.step_buffers == slow.step_buffers + 1 == MOST_STEP_BUFFERS


def test_a_plan_prints() -> None:
    made = make(40 * MIB, 200 * MIB)
    assert all(kind in made.table() for kind in KINDS)
