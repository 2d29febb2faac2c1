"""The state table of gradients against a dictionary that knows what a user sees: what is stored, what is in a slot."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.gradients.state import LEGAL, GradientState, GradientTable, IllegalGradientMove

SIZES = (3, 1, 2)
"""Parameters of each partition."""
PLACES = [(pid, position) for pid, size in enumerate(SIZES) for position in range(size)]


class Model:
    """Of each gradient: is it stored, is there a contribution in a slot, is it averaged and not agreed on."""

    def __init__(self) -> None:
        self.stored = dict.fromkeys(PLACES, False)
        self.filling = dict.fromkeys(PLACES, False)
        self.reducing = dict.fromkeys(PLACES, False)
        self.consumed = dict.fromkeys(PLACES, False)

    def of(self, facts: dict[tuple[int, int], bool], pid: int) -> set[int]:
        return {position for place, position in PLACES if place == pid and facts[place, position]}

    def may_arrive(self, place: tuple[int, int]) -> bool:
        return not self.filling[place] and not self.consumed[place]

    def may_drop(self, place: tuple[int, int]) -> bool:
        return (self.stored[place] or self.reducing[place]) and not self.filling[place]


def check(table: GradientTable, model: Model) -> None:
    for pid, size in enumerate(SIZES):
        assert table.stored(pid) == model.of(model.stored, pid)
        assert table.filling(pid) == model.of(model.filling, pid)
        assert table.is_filled(pid) == (len(model.of(model.filling, pid)) == size)
        consumed = {p for p in range(size) if table.state(pid, p) is GradientState.CONSUMED}
        assert consumed == model.of(model.consumed, pid)


@given(st.data())
def test_every_sequence_of_moves_agrees_with_a_dictionary(data: st.DataObject) -> None:
    table, model = GradientTable(SIZES), Model()
    for _ in range(data.draw(st.integers(0, 40))):
        move = data.draw(st.sampled_from(["arrive", "store", "reduce", "agree", "drop", "consume", "reopen"]))
        pid, position = place = data.draw(st.sampled_from(PLACES))
        here = [other for other in PLACES if other[0] == pid]
        if move == "arrive" and model.may_arrive(place):
            table.arrive(pid, position)
            model.filling[place] = True
            if model.reducing[place]:  # it was averaged already: the home holds the sum that this one is added to
                model.reducing[place], model.stored[place] = False, True
        elif move == "store":
            expected = model.of(model.filling, pid), model.of(model.stored, pid)
            assert table.store(pid) == expected
            for other in here:
                model.stored[other] |= model.filling[other]
                model.filling[other] = False
        elif move == "reduce" and not any(model.consumed[other] for other in here):
            table.reduce(pid)
            for other in here:
                model.reducing[other] = not model.stored[other]
                model.filling[other] = False
        elif move == "agree":
            united = {pid: {other for _, other in data.draw(st.sets(st.sampled_from(here)))}}
            table.agree(united)
            for other in PLACES:
                if model.reducing[other]:
                    model.reducing[other] = False
                    model.stored[other] = other[1] in united.get(other[0], ())
        elif move == "drop" and model.may_drop(place):
            table.drop(pid, (position,))
            model.stored[place] = model.reducing[place] = model.consumed[place] = False
        elif move == "consume" and not any(model.filling[other] or model.consumed[other] for other in here):
            table.consume(pid)
            for other in here:
                model.consumed[other] = model.stored[other]
        elif move == "reopen":
            table.reopen()
            model.consumed = dict.fromkeys(PLACES, False)
        check(table, model)


def test_an_illegal_move_is_told_with_the_moves_before_it() -> None:
    table = GradientTable(SIZES)
    table.arrive(0, 1)
    with pytest.raises(
        IllegalGradientMove, match=r"parameter 1 of partition 0 is filling.*\[1\] to filling \(arrive\)"
    ):
        table.arrive(0, 1)
    assert table.state(0, 1) is GradientState.FILLING


def test_nothing_may_arrive_for_what_a_step_in_backward_has_taken() -> None:
    table = GradientTable(SIZES)
    table.arrive(1, 0)
    table.store(1)
    table.consume(1)
    with pytest.raises(IllegalGradientMove, match="is consumed"):
        table.arrive(1, 0)
    table.reopen()
    table.arrive(1, 0)
    assert table.state(1, 0) is GradientState.ADDING


def test_every_state_can_be_left_and_reached() -> None:
    assert set(LEGAL) == set(GradientState)
    assert all(LEGAL.values())
    assert set().union(*LEGAL.values()) == set(GradientState)
