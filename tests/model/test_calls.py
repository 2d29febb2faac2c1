"""The states of a call: a backward holds it, may suspend it, and leaves it waiting for another one."""

import pytest
from torch import nn

from offload.errors import InternalError
from offload.model.calls import LEGAL, Call, CallState


def test_a_call_goes_through_two_backwards_of_one_graph() -> None:
    call = Call(nn.Linear(1, 1), (0,), (0,), CallState.FORWARD)
    for state in (CallState.WAITING, CallState.HELD, CallState.SUSPENDED, CallState.HELD, CallState.WAITING):
        call.become(state)
    call.become(CallState.HELD)
    assert call.state is CallState.HELD


@pytest.mark.parametrize("new", [CallState.HELD, CallState.SUSPENDED, CallState.WAITING])
def test_a_covered_call_is_never_held_by_itself(new: CallState) -> None:
    call = Call(nn.Linear(1, 1), (0,), (0,), CallState.COVERED)
    with pytest.raises(InternalError, match=f"Linear is {CallState.COVERED}, and cannot become {new}"):
        call.become(new)
    assert call.state is CallState.COVERED


def test_every_state_has_its_moves() -> None:
    assert LEGAL.keys() == set(CallState)
