"""What is fetched, kept and resharded, as literal lists and under random sequences."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError, InternalError
from offload.weights.schedule import Action, Fetch, Reshard, Schedule, SlotState

A, B, C, D = range(4)


def make(capacity: int, num: int = 4) -> Schedule:
    return Schedule(dict.fromkeys(range(num), 1), capacity, resident=())


def round_of(schedule: Schedule, order: list[int]) -> list[list[Action]]:
    """Acquire and release each in turn; what every acquire and the release after it did."""
    log = []
    for pid in order:
        log.append(schedule.acquire(pid) + schedule.release(pid))
        schedule.validate()
    return log


def fetches(log: list[list[Action]]) -> list[int]:
    return [action.pid for actions in log for action in actions if isinstance(action, Fetch)]


FORWARD_BACKWARD = [A, B, C, D, D, C, B, A]


def test_the_first_cycle_fetches_on_demand_and_counts_nothing() -> None:
    schedule = make(2)
    assert fetches(round_of(schedule, FORWARD_BACKWARD))[:4] == [A, B, C, D]
    assert schedule.unplanned_fetches == 0


def test_the_second_cycle_runs_ahead_and_nothing_is_unplanned() -> None:
    schedule = make(3)
    round_of(schedule, FORWARD_BACKWARD)
    ahead = schedule.step(covered=[A, B, C, D])
    assert [a.pid for a in ahead if isinstance(a, Fetch)] == [A, B, C]  # in forward order, as many as fit
    log = round_of(schedule, FORWARD_BACKWARD)
    assert schedule.unplanned_fetches == 0
    # D forward, into A's slot; B, C and D are still there at the turn; A once more, backward
    assert fetches(log) == [D, A]


def test_nothing_beyond_the_cycle_is_fetched_before_the_step() -> None:
    schedule = make(4)
    round_of(schedule, FORWARD_BACKWARD)
    schedule.step([A, B, C, D])
    log = round_of(schedule, FORWARD_BACKWARD)
    assert fetches(log[4:]) == []  # everything fits, and the next cycle's weights do not exist yet


def test_a_step_reshards_what_it_covers() -> None:
    schedule = make(4)
    round_of(schedule, FORWARD_BACKWARD)
    actions = schedule.step(covered=[B])
    assert [a for a in actions if isinstance(a, Reshard)] == [Reshard(B)]
    assert schedule.state(A) is SlotState.KEPT


def test_leaving_the_order_is_counted_and_recovers() -> None:
    schedule = make(2)
    round_of(schedule, FORWARD_BACKWARD)
    schedule.step([A, B, C, D])
    round_of(schedule, [D, A, A, D])
    assert schedule.unplanned_fetches > 0
    schedule.step([A, D])
    before = schedule.unplanned_fetches
    round_of(schedule, [D, A, A, D])
    assert schedule.unplanned_fetches == before


def test_more_in_use_than_fits_names_them() -> None:
    schedule = make(1)
    schedule.acquire(A)
    with pytest.raises(BudgetError, match="in use"):
        schedule.acquire(B)


def test_releasing_what_is_not_acquired_tells_the_story() -> None:
    with pytest.raises(InternalError):
        make(2).release(A)


def test_resident_partitions_are_never_fetched() -> None:
    schedule = Schedule({A: 5, B: 1}, 1, resident=[A])
    assert schedule.acquire(A) == []
    assert [a.pid for a in schedule.acquire(B)] == [B]


@settings(deadline=None, max_examples=150)
@given(
    capacity=st.integers(2, 6),
    sizes=st.lists(st.integers(1, 3), min_size=3, max_size=6),
    moves=st.lists(st.tuples(st.sampled_from(["use", "nest", "step", "reset"]), st.integers(0, 5)), max_size=60),
)
def test_any_sequence_stays_within_the_ring_and_never_stands_still(
    capacity: int, sizes: list[int], moves: list[tuple[str, int]]
) -> None:
    schedule = Schedule(dict(enumerate(sizes)), capacity, resident=())
    twin = Schedule(dict(enumerate(sizes)), capacity, resident=())
    on_device: set[int] = set()

    def carry_out(actions: list[Action], same: list[Action]) -> None:
        assert actions == same  # a function of the calls alone
        for action in actions:
            if isinstance(action, Fetch):
                assert action.pid not in on_device
                on_device.add(action.pid)
            else:
                assert schedule.count(action.pid) == 0
                on_device.remove(action.pid)
            assert sum(sizes[pid] for pid in on_device) <= capacity

    for kind, number in moves:
        pid = number % len(sizes)
        if kind in ("use", "nest"):
            try:
                carry_out(schedule.acquire(pid), twin.acquire(pid))
            except BudgetError:
                with pytest.raises(BudgetError):
                    twin.acquire(pid)
                held = sum(sizes[p] for p in range(len(sizes)) if schedule.count(p))
                assert held + sizes[pid] > capacity
                continue
            assert pid in on_device
            if kind == "use":
                carry_out(schedule.release(pid), twin.release(pid))
        elif kind == "step":
            while any(schedule.count(p) for p in range(len(sizes))):
                held = next(p for p in range(len(sizes)) if schedule.count(p))
                carry_out(schedule.release(held), twin.release(held))
            carry_out(schedule.step([pid]), twin.step([pid]))
        else:
            carry_out(schedule.reset(), twin.reset())
        schedule.validate()


def test_evaluation_between_and_within_training_leaves_its_order_alone() -> None:
    schedule = make(2)
    forward = [0, 1, 2, 3]
    for _ in range(4):
        schedule.begin(evaluating=False)
        round_of(schedule, forward)
        schedule.begin(evaluating=True)
        round_of(schedule, [3, 0, 2, 1])
        schedule.end_evaluation()
        round_of(schedule, forward[::-1])
        schedule.step(range(4))
    assert schedule.unplanned_fetches == 0
    assert list(schedule.order) == forward + forward[::-1]
    assert schedule.first_uses() == forward


def test_where_nothing_trains_the_next_forward_is_fetched_ahead() -> None:
    schedule = make(2)
    for _ in range(3):
        schedule.begin(evaluating=True)
        log = round_of(schedule, [0, 1, 2, 3])
        ahead = schedule.end_evaluation()
    assert [a.pid for a in ahead if isinstance(a, Fetch)][:1] == [0]
    assert schedule.unplanned_fetches == 0
    assert all(fetch.planned for actions in log for fetch in actions if isinstance(fetch, Fetch))
