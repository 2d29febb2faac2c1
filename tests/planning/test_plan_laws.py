"""Laws of every plan: exact totals, sufficient staging buffers, budgets kept, more is never worse, exact errors."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.planning.cost import chunk_numels
from offload.planning.planner import Budgets, Encoding, PartitionSizes, Plan, plan
from offload.units import DISK_ALIGN_BYTES, MAX_CHUNK_NUMEL, MIB, Tier, round_up
from tests.doubles.smallest_rings import plan_smallest

MOMENTS = (("exp_avg", 4), ("exp_avg_sq", 4))
ENCODINGS = [
    Encoding(2, 2, 4, (("master", 4), *MOMENTS)),
    Encoding(
        2,
        2,
        4,
        (("remainder", 2), *MOMENTS),
        resident_state_tensors=(("master", 4), *MOMENTS),
        device_workspace_itemsize=12,
    ),
    Encoding(2, 2, 2, (("remainder", 2), *MOMENTS)),
    Encoding(4, 4, 4, MOMENTS),
    Encoding(2, 2, 4, (("exp_avg", 1), ("scale", 4 / 256))),
    Encoding(2, 2, 2, ()),
]
LARGE_DISK = 10**12

numels = st.one_of(st.just(0), st.integers(1, 20), st.integers(500, 5_000), st.integers(16_000, 40_000)).map(
    lambda n: n * 128
)
budgets = st.one_of(st.none(), st.integers(0, 200 * MIB), st.integers(0, 8 * MIB))
disks = st.sampled_from([0, 10 * MIB, LARGE_DISK])


@st.composite
def models(draw: st.DrawFn) -> list[PartitionSizes]:
    num = draw(st.integers(1, 7))
    made = []
    for index in range(num):
        trainable, frozen = draw(numels), draw(numels)
        held_with = tuple(other for other in range(num) if other != index and draw(st.integers(0, 5)) == 0)
        build_bytes = draw(st.sampled_from([0, 1000, 5_000_000]))
        sizes = (trainable or 128 * (not frozen), frozen)
        made.append(PartitionSizes(index, f"p{index}", *sizes, held_with, build_bytes))
    return made


def try_plan(
    model: list[PartitionSizes], encoding: Encoding, device: int | None, host: int | None, disk: int, state: bool
) -> Plan | BudgetError:
    try:
        return plan(model, encoding, Budgets(device, host, disk), device_state=state)
    except BudgetError as error:
        return error


def padded(num_bytes: float) -> int:
    return round_up(-int(-num_bytes // 1), DISK_ALIGN_BYTES)


def check(model: list[PartitionSizes], encoding: Encoding, made: Plan) -> None:
    """Recount every byte chunk by chunk; every chunk finds staging buffers that are large enough for it."""

    def slot(p: PartitionSizes) -> int:
        return (p.trainable_numel + p.frozen_numel) * encoding.weight_itemsize

    totals = {
        Tier.DEVICE: made.slot_ring_bytes
        + made.gradient_slots * made.gradient_slot_bytes
        + made.device_workspace_bytes,
        Tier.HOST: made.build_bytes
        + made.step_buffers * made.step_buffer_bytes
        + made.weight_buffers * made.weight_buffer_bytes
        + made.offload_buffers * made.offload_buffer_bytes,
        Tier.DISK: 0,
    }
    step, weight, offload = [0], [0], [0]
    largest = min(made.chunk_numel, max(p.trainable_numel for p in model))
    on_device = any(tier is Tier.DEVICE for homes in made.homes for tier in homes.state)
    assert made.device_workspace_bytes == on_device * largest * encoding.device_workspace_itemsize
    for p, homes in zip(model, made.homes, strict=True):
        state_tensors = encoding.state_tensors
        if homes.weights_on_device and encoding.resident_state_tensors is not None:
            state_tensors = encoding.resident_state_tensors
        if homes.weights_on_device:
            totals[Tier.DEVICE] += slot(p)
        else:
            beside = sum(slot(model[other]) for other in p.held_with if not made.homes[other].weights_on_device)
            assert made.slot_ring_bytes >= slot(p) + beside
        trainable = chunk_numels(p.trainable_numel, made.chunk_numel)
        frozen = chunk_numels(p.frozen_numel, made.chunk_numel)
        weights = [
            *zip(trainable, homes.trainable_weights, strict=True),
            *zip(frozen, homes.frozen_weights, strict=True),
        ]
        for numel, tier in weights:
            assert (tier is Tier.DEVICE) == homes.weights_on_device
            if tier is not Tier.DEVICE:
                totals[tier] += padded(numel * encoding.weight_itemsize)
            if tier is Tier.DISK:
                weight.append(padded(numel * encoding.weight_itemsize))
        for numel, at, gradient, state in zip(
            trainable, homes.trainable_weights, homes.gradients, homes.state, strict=True
        ):
            assert (gradient is Tier.DEVICE) == (state is Tier.DEVICE)
            assert at is Tier.DEVICE or state is not Tier.DEVICE
            gradient_bytes = padded(numel * encoding.gradient_itemsize)
            state_bytes = sum(padded(numel * size) for _, size in state_tensors)
            totals[gradient] += gradient_bytes
            totals[state] += state_bytes
            out = state is not Tier.DEVICE and at is not Tier.HOST
            step.append(
                (state is Tier.DISK) * state_bytes
                + (gradient is Tier.DISK) * gradient_bytes
                + out * padded(numel * encoding.weight_itemsize)
            )
            if gradient is not Tier.DEVICE:
                offload.append(padded(numel * encoding.wire_itemsize) + (gradient is Tier.DISK) * gradient_bytes)
    assert totals == {Tier.DEVICE: made.device_bytes, Tier.HOST: made.host_bytes, Tier.DISK: made.disk_bytes}
    # exact: not a byte more than the largest need, and no ring that nothing needs
    assert (made.step_buffer_bytes, made.weight_buffer_bytes, made.offload_buffer_bytes) == (
        max(step),
        max(weight),
        max(offload),
    )
    assert [made.step_buffers > 0, made.weight_buffers > 0, made.offload_buffers > 0] == [
        any(step),
        any(weight),
        any(offload),
    ]


@settings(deadline=None, max_examples=120)
@given(models(), st.sampled_from(ENCODINGS), budgets, budgets, disks, st.booleans(), st.booleans())
def test_totals_are_exact_and_buffers_suffice(
    model: list[PartitionSizes],
    encoding: Encoding,
    device: int | None,
    host: int | None,
    disk: int,
    state: bool,
    minimum: bool,
) -> None:
    try:
        plan_of_sizes = plan_smallest if minimum else plan
        made = plan_of_sizes(model, encoding, Budgets(device, host, disk), device_state=state)
    except BudgetError:
        return
    check(model, encoding, made)
    assert device is None or made.device_bytes <= device
    assert host is None or made.host_bytes <= host
    assert made.disk_bytes <= disk
    if minimum:
        assert max(made.gradient_slots, made.step_buffers, made.weight_buffers, made.offload_buffers) <= 1


@settings(deadline=None, max_examples=120)
@given(models(), st.sampled_from(ENCODINGS[:4]), budgets, budgets, disks, st.booleans())
def test_the_budgets_named_by_the_error_do_and_a_byte_less_does_not(
    model: list[PartitionSizes], encoding: Encoding, device: int | None, host: int | None, disk: int, state: bool
) -> None:
    error = try_plan(model, encoding, device, host, disk, state)
    if isinstance(error, Plan):
        return
    needed = {name: int(num) for name, num in re.findall(r"smallest (\w+) .*?is (\d+) bytes", str(error))}
    smallest = needed["device_memory"]
    assert isinstance(try_plan(model, encoding, smallest, None, LARGE_DISK, state), Plan)
    assert not smallest or isinstance(try_plan(model, encoding, smallest - 1, None, LARGE_DISK, state), BudgetError)
    beside = None if device is None else max(device, smallest)
    if "host_memory" in needed:
        at = needed["host_memory"]
        assert isinstance(try_plan(model, encoding, beside, at, disk, state), Plan)
        assert not at or isinstance(try_plan(model, encoding, beside, at - 1, disk, state), BudgetError)
    if "disk_space" in needed:
        at = needed["disk_space"]
        assert isinstance(try_plan(model, encoding, beside, host, at, state), Plan)
        assert isinstance(try_plan(model, encoding, beside, host, at - 1, state), BudgetError)


@settings(deadline=None, max_examples=100)
@given(models(), st.sampled_from(ENCODINGS[:4]), st.integers(0, 200 * MIB), st.integers(1, 30 * MIB), st.booleans())
def test_more_device_memory_is_used(
    model: list[PartitionSizes], encoding: Encoding, device: int, more: int, state: bool
) -> None:
    small = try_plan(model, encoding, device, None, 0, state)
    large = try_plan(model, encoding, device + more, None, 0, state)
    if isinstance(small, Plan):
        assert isinstance(large, Plan)
        assert large.device_bytes >= small.device_bytes
        assert large.device_bytes - small.device_bytes <= device + more


@settings(deadline=None, max_examples=100)
@given(
    models(), st.sampled_from(ENCODINGS[:4]), st.integers(5, 40), st.integers(0, 200 * MIB), st.integers(1, 30 * MIB)
)
def test_more_host_memory_means_less_on_disk(
    model: list[PartitionSizes], encoding: Encoding, device_mib: int, host: int, more: int
) -> None:
    small = try_plan(model, encoding, device_mib * MIB, host, LARGE_DISK, False)
    large = try_plan(model, encoding, device_mib * MIB, host + more, LARGE_DISK, False)
    if isinstance(small, BudgetError):
        return
    assert isinstance(large, Plan)
    on_device = [[homes.weights_on_device for homes in made.homes] for made in (small, large)]
    if small.chunk_numel == large.chunk_numel and on_device[0] == on_device[1]:
        assert large.disk_bytes <= small.disk_bytes


def test_disk_bytes_shrink_chunk_by_chunk() -> None:
    # one chunk of state: three state tensors of 4 bytes an element, with its staging buffers unchanged
    model = [PartitionSizes(index, f"block {index}", 4 * MAX_CHUNK_NUMEL, 0) for index in range(8)]
    chunk_bytes = 12 * MAX_CHUNK_NUMEL
    on_disk = []
    for host_mib in range(900, 1200, 4):
        made = try_plan(model, ENCODINGS[0], 60 * MIB, host_mib * MIB, LARGE_DISK, False)
        assert isinstance(made, Plan)
        assert made.disk_bytes == 0 or host_mib * MIB - made.host_bytes < chunk_bytes
        on_disk.append(made.disk_bytes)
    steps = {before - after for before, after in pairwise(on_disk)}
    # where everything fits at last, the three step staging make room too: their bytes and up to one chunk more
    assert steps == {0, chunk_bytes, 4 * chunk_bytes}
    assert on_disk[-1] == 0


@settings(deadline=None, max_examples=100)
@given(models(), st.sampled_from(ENCODINGS[:4]), st.integers(0, 60 * MIB))
def test_state_on_the_device_is_that_of_the_first_chunks_in_forward_order_and_as_much_as_fits(
    model: list[PartitionSizes], encoding: Encoding, device: int
) -> None:
    made = try_plan(model, encoding, device, None, 0, True)
    if isinstance(made, BudgetError):
        return
    tiers = [tier for homes in made.homes for tier in homes.state]
    assert tiers == sorted(tiers, key=[Tier.DEVICE, Tier.HOST].index)
    if Tier.HOST not in tiers:
        return
    chunks = [
        (homes.weights_on_device, numel)
        for p, homes in zip(model, made.homes, strict=True)
        for numel in chunk_numels(p.trainable_numel, made.chunk_numel)
    ]
    resident, numel = chunks[tiers.index(Tier.HOST)]  # the first that is not there
    state_tensors = (
        encoding.state_tensors if encoding.resident_state_tensors is None else encoding.resident_state_tensors
    )
    needed = padded(numel * encoding.gradient_itemsize) + sum(padded(numel * size) for _, size in state_tensors)
    if Tier.DEVICE not in tiers:
        largest = min(made.chunk_numel, max(p.trainable_numel for p in model))
        needed += largest * encoding.device_workspace_itemsize
    assert not resident or made.device_bytes + needed > device


def test_the_state_of_the_next_partition_joins_the_device_when_its_bytes_fit_and_not_before() -> None:
    model = [PartitionSizes(index, f"block {index}", 65_536, 0) for index in range(8)]
    # record of master and two moments 12 bytes an element, gradient 4; workspace 12 once
    state, workspace = 16 * 65_536, 12 * 65_536
    without_state = plan(model, ENCODINGS[1], Budgets(10**9, None, 0), device_state=False)
    assert without_state.bytes_by_kind_and_tier["weights"][Tier.DEVICE] == 8 * 131_072
    for num in range(8):
        budget = without_state.device_bytes + (workspace if num else 0) + num * state
        made = [try_plan(model, ENCODINGS[1], budget + more, None, 0, True) for more in (0, -1)]
        counts = [[homes.state for homes in one.homes].count((Tier.DEVICE,)) for one in made if isinstance(one, Plan)]
        if num:
            assert counts == [num, num - 1]
        else:
            assert counts[0] == 0


@pytest.mark.parametrize("gradient_slots", [1, 2])
def test_everything_on_the_device_beats_one_more_gradient_slot(gradient_slots: int) -> None:
    model = [PartitionSizes(0, "all", 1024 * 128, 0)]
    slot, gradient_and_state, gradient_slot = 262_144, 524_288 + 3 * 524_288, 262_144
    device_bytes = slot + gradient_and_state + gradient_slots * gradient_slot
    made = plan(model, ENCODINGS[0], Budgets(device_bytes, 0, 0), device_state=True)
    assert (made.gradient_slots, made.host_bytes, made.device_bytes) == (gradient_slots, 0, device_bytes)
    if gradient_slots == 1:
        with pytest.raises(BudgetError):
            plan(model, ENCODINGS[0], Budgets(made.device_bytes - 1, 0, 0), device_state=True)


def test_a_third_gradient_slot_comes_after_the_lookahead_and_before_weights_at_home() -> None:
    model = [PartitionSizes(index, f"block {index}", 1024 * 128, 0) for index in range(8)]
    slot = 262_144

    def rings(device_bytes: int) -> tuple[int, int]:
        made = plan(model, ENCODINGS[0], Budgets(device_bytes, None, 0), device_state=False)
        return made.slot_ring_bytes // slot, made.gradient_slots

    assert [rings(number * slot) for number in (2, 3, 4, 5, 6)] == [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]
    assert rings(6 * slot - 1) == (3, 2)


def test_slots_hold_the_flats_of_all_ranks_and_homes_this_ranks_shard() -> None:
    model = [PartitionSizes(index, f"block {index}", 128_000, 0) for index in range(8)]
    made = plan_smallest(
        model,
        ENCODINGS[0],
        Budgets(2_000_000, None, 0),
        world_size=2,
        is_sharded=True,
        device_state=False,
    )
    assert made.gradient_slot_bytes == made.slot_ring_bytes == made.exchange_bytes == 512_000
    assert made.bytes_by_kind_and_tier["weights"][Tier.DEVICE] == padded(256_000)
    assert made.bytes_by_kind_and_tier["weights"][Tier.HOST] == 7 * padded(256_000)


def test_a_model_of_a_million_chunks_is_refused_without_counting_each() -> None:
    model = [PartitionSizes(index, f"block {index}", 800_000_000, 0) for index in range(200)]
    with pytest.raises(BudgetError, match="host_memory"):
        plan(model, ENCODINGS[0], Budgets(8 << 30, 16 << 30, 0), device_state=True)
