"""Literal actions, call by call: "F1" fetch on demand, "P1" fetch that the prediction named, "R1" reshard."""

from collections.abc import Sequence

import pytest

from offload.errors import BudgetError
from offload.weights.schedule import MAX_RECORDED, Action, Fetch, IllegalMove, Schedule, SlotState

FORWARD = [0, 1, 2, 3]
FORWARD_BACKWARD = [0, 1, 2, 3, 3, 2, 1, 0]
ALL = range(4)


def text(actions: Sequence[Action]) -> str:
    names = [f"{'P' if a.planned else 'F'}{a.pid}" if isinstance(a, Fetch) else f"R{a.pid}" for a in actions]
    return " ".join(names)


def uses(schedule: Schedule, order: Sequence[int]) -> list[tuple[str, str]]:
    """(actions of the acquire, actions of the release) of each use in turn."""
    log = []
    for pid in order:
        log.append((text(schedule.acquire(pid)), text(schedule.release(pid))))
        schedule.validate()
    return log


def equal_blocks(num_slots: int, keep_bytes_free: int = 0) -> Schedule:
    return Schedule(dict.fromkeys(ALL, 1), num_slots, resident=(), keep_bytes_free=keep_bytes_free)


def trained(num_slots: int, order: Sequence[int] = FORWARD_BACKWARD) -> Schedule:
    schedule = equal_blocks(num_slots)
    uses(schedule, order)
    schedule.step(ALL)
    return schedule


def test_two_slots_over_two_steps() -> None:
    schedule = equal_blocks(2)
    assert uses(schedule, FORWARD_BACKWARD) == [
        ("F0", ""), ("F1", ""), ("R1 F2", ""), ("R2 F3", ""),  # nothing known: 0 stays, the others stream
        ("", ""), ("R3 F2", ""), ("R2 F1", ""), ("", ""),  # 3 is not fetched twice at the turn, nor 0 at the end
    ]  # fmt: skip
    assert text(schedule.step(ALL)) == "R0 R1 P0 P1"
    assert uses(schedule, FORWARD_BACKWARD) == [
        ("", "R0 P2"), ("", "R1 P3"), ("", ""), ("", ""),  # a slot is handed on as soon as it is released
        ("", "R3 P1"), ("", "R2 P0"), ("", ""), ("", ""),  # 3 and 2 are there at the turn
    ]  # fmt: skip
    assert text(schedule.step(ALL)) == "R0 R1 P0 P1"
    assert (schedule.unplanned_fetches, schedule.late_fetches) == (0, 0)


def test_three_slots_over_two_steps() -> None:
    schedule = trained(3)
    assert uses(schedule, FORWARD_BACKWARD) == [
        ("", "R0 P3"), ("", ""), ("", ""), ("", ""),
        ("", "R3 P0"), ("", ""), ("", ""), ("", ""),  # 3, 2 and 1 are there at the turn
    ]  # fmt: skip
    assert text(schedule.step(ALL)) == "R0 R1 R2 P0 P1 P2"


def test_rounds_of_one_step_are_one_cycle() -> None:
    schedule = trained(3, FORWARD_BACKWARD * 2)
    one_round = [
        ("", "R0 P3"), ("", ""), ("", ""), ("", ""),
        ("", "R3 P0"), ("", ""), ("", ""), ("", ""),  # 0, 1 and 2 stay for the next round
    ]  # fmt: skip
    assert uses(schedule, FORWARD_BACKWARD * 2) == one_round * 2
    assert schedule.unplanned_fetches == 0


@pytest.mark.parametrize("rounds", [1, 3, 4])
def test_another_number_of_rounds_finds_its_place_by_the_turn(rounds: int) -> None:
    schedule = trained(3, FORWARD_BACKWARD * 2)
    uses(schedule, FORWARD_BACKWARD * rounds)
    schedule.step(ALL)
    assert schedule.unplanned_fetches == 0


def test_evaluation_between_steps_costs_a_fetch_a_pass_and_the_next_clean_cycle_is_planned_again() -> None:
    schedule = trained(3)
    for _ in range(3):
        uses(schedule, FORWARD)
    assert schedule.unplanned_fetches == 2  # each pass after the first begins where a backward was predicted
    for _ in range(3):
        uses(schedule, FORWARD_BACKWARD)
        schedule.step(ALL)
    before = schedule.unplanned_fetches
    uses(schedule, FORWARD_BACKWARD)
    assert schedule.unplanned_fetches == before


def test_generation_without_a_step_keeps_some_partitions_and_streams_the_rest() -> None:
    schedule = equal_blocks(2)
    uses(schedule, FORWARD)
    for _ in range(5):
        fetched = [acquired for acquired, _ in uses(schedule, FORWARD) if acquired]
        assert len(fetched) <= 3  # least recently used would fetch all four
    assert schedule.unplanned_fetches == 0  # there was no prediction to miss


def test_a_skipped_layer_costs_no_unplanned_fetch() -> None:
    schedule = trained(3)
    uses(schedule, [0, 2, 3, 3, 2, 0])
    assert schedule.unplanned_fetches == 0


def test_nothing_is_fetched_beyond_the_end_of_the_cycle() -> None:
    schedule = trained(4)
    schedule.step([0])
    uses(schedule, FORWARD_BACKWARD)
    assert all(actions == ("", "") for actions in uses(schedule, [0]))  # kept since the last backward
    ahead = schedule.step([0, 1])
    assert text(ahead) == "R0 R1 P0 P1"


def test_the_partition_predicted_next_is_late_not_unplanned_when_there_was_no_room() -> None:
    schedule = Schedule({0: 2, 1: 2}, 3, resident=(), keep_bytes_free=2)  # too little is left for any prefetch
    uses(schedule, [0, 1])
    schedule.step([0, 1])
    assert uses(schedule, [0, 1]) == [("P0", ""), ("R0 P1", "")]
    assert (schedule.late_fetches, schedule.unplanned_fetches) == (2, 0)


def test_prefetch_leaves_the_bytes_asked_for_free() -> None:
    schedule = equal_blocks(3, keep_bytes_free=1)
    uses(schedule, FORWARD_BACKWARD)
    assert text(schedule.step(ALL)).endswith("P0 P1")
    assert schedule.held_bytes == 2


def test_a_step_inside_a_use_keeps_the_slot_until_the_use_ends() -> None:
    schedule = equal_blocks(2)
    schedule.acquire(0)
    assert schedule.step(ALL) == []
    assert schedule.state(0) is SlotState.ACQUIRED
    assert text(schedule.release(0)) == "R0 P0"  # the old weights go, the new ones are predicted
    schedule.validate()


def test_a_reset_ends_all_uses_and_training_goes_on() -> None:
    schedule = trained(2)
    schedule.acquire(0)
    schedule.acquire(0)
    schedule.acquire(1)
    assert schedule.reset() == []
    assert [schedule.count(pid) for pid in ALL] == [0, 0, 0, 0]
    schedule.validate()
    uses(schedule, FORWARD_BACKWARD)
    schedule.step(ALL)
    before = schedule.unplanned_fetches
    for _ in range(2):
        uses(schedule, FORWARD_BACKWARD)
        schedule.step(ALL)
    assert schedule.unplanned_fetches <= before + 2


def test_partitions_at_home_count_and_have_a_place_in_the_forward_order() -> None:
    schedule = Schedule({0: 9, 1: 1, 2: 1}, 1, resident=[0])
    assert [text(schedule.acquire(pid)) for pid in (1, 0, 0)] == ["F1", "", ""]
    assert [text(schedule.release(pid)) for pid in (0, 0, 1)] == ["", "", ""]
    assert schedule.first_uses() == [1, 0]
    schedule.step([0, 1])
    assert schedule.first_uses() == [1, 0]
    assert schedule.order == (1,)
    with pytest.raises(IllegalMove):
        schedule.release(0)


def test_a_refused_acquire_changes_nothing_and_names_all() -> None:
    schedule = Schedule({0: 3, 1: 2}, 4, resident=())
    schedule.acquire(0)
    with pytest.raises(BudgetError, match=r"partition 1 needs .* 2 bytes .* 0 \(3 bytes\).* 4 bytes .* has 5 "):
        schedule.acquire(1)
    schedule.validate()
    assert schedule.order == ()
    schedule.release(0)
    assert text(schedule.acquire(1)) == "R0 F1"


def test_releasing_what_is_not_acquired_tells_its_history() -> None:
    schedule = equal_blocks(2)
    uses(schedule, [0])
    with pytest.raises(IllegalMove, match=r"absent -> acquired \(acquire\)\n  acquired -> kept \(release\)"):
        schedule.release(0)


def test_a_cycle_too_long_to_record_is_counted_and_predicted_as_far_as_recorded() -> None:
    schedule = equal_blocks(2)
    for _ in range(MAX_RECORDED // 4 + 1):
        for pid in FORWARD:
            schedule.acquire(pid)
            schedule.release(pid)
    assert schedule.unrecorded_acquires == 4
    schedule.step(ALL)
    assert len(schedule.order) == MAX_RECORDED
    uses(schedule, FORWARD * 3)
    assert schedule.unplanned_fetches == 0
