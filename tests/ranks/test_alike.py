"""Ranks whose programs differ: an error that names both sides, soon, whatever the calls in which they wait."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import offload
from offload.errors import OffloadError, RankFailedError, RanksDivergedError
from offload.gradients.agreement import options_of
from offload.ranks.program import NUM_KEPT, Program, parting
from offload.session import Session
from tests.ranks.test_collectives import join, tell, wait_for
from tests.ranks.training import Model, batches, build, loss_of, own_part, session_of
from tests.ranks.world import Place, World

DEADLINE_S = 600.0
"""Of every wait here: ten times what a run of ranks may take before the test ends it."""


# -------------------------------------------------------------------------------------------------------- the program


def test_programs_part_at_the_first_request_that_differs() -> None:
    one, other = Program(), Program()
    for what in ("a", "b", "c"):
        one.ask(what)
        other.ask(what)
    assert parting(one.told(), other.told()) is None
    one.ask("d")
    assert parting(one.told(), other.told()) is None, "one is ahead"
    other.ask("e")
    one.ask("f")
    assert parting(one.told(), other.told()) == ("d", "e")


def test_programs_are_compared_by_number_where_one_is_far_ahead() -> None:
    one, other = Program(), Program()
    for number in range(NUM_KEPT + 10):
        one.ask(f"{number}")
        if number < 20:
            other.ask(f"{number}")
    assert len(json.loads(one.told())[1]) == NUM_KEPT
    assert parting(one.told(), other.told()) is None
    other.ask("something else")
    assert parting(one.told(), other.told()) == ("20", "something else")


def test_options_are_compared_by_what_they_say_and_not_by_where_they_are() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 0.1 + 0.2, "seen": object()}], momentum=0.5)
    assert options_of(optimizer).startswith("group 0 lr=0.3, momentum=0.5")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    assert options_of(optimizer).startswith("group 0 lr=0.25, momentum=0.5")
    assert "object" not in options_of(optimizer)


def wait_in_different_groups(place: Place) -> None:
    ranks = join(wait_timeout_s=DEADLINE_S)
    try:
        if place.rank == 0:
            ranks.exchange("")
        else:
            ranks.ask("gather the weights of h.0")
            ranks.check_order("gather the weights of h.0")
    finally:
        ranks.close()


@pytest.mark.parametrize("store", ["file", "tcp"])
def test_ranks_that_wait_in_different_groups_are_told_what_each_was_about_to_do(world: World, store: str) -> None:
    outcomes = world.outcomes(wait_in_different_groups, 3, store=store)
    assert any(isinstance(outcome.error, RanksDivergedError) for outcome in outcomes), outcomes[0].output
    for outcome in outcomes:
        assert isinstance(outcome.error, OffloadError), outcome.output
        assert "rank 0: exchange texts" in str(outcome.error)
        assert ": gather the weights of h.0" in str(outcome.error)


def fail_while_a_lane_waits(place: Place) -> str:
    """Rank 0 does not come, and cannot be told: what rank 1 has on its way must end with its own failure."""
    ranks = join(wait_timeout_s=DEADLINE_S)
    if place.rank == 0:
        wait_for("rank 1 is over")
        return ""
    errors: list[Exception] = []

    def lane() -> None:
        try:
            ranks.check_order("gather the weights of h.0")
        except RankFailedError as error:
            errors.append(error)

    thread = threading.Thread(target=lane)
    thread.start()
    ranks.note_failure("KeyboardInterrupt")
    thread.join()
    tell("rank 1 is over")
    return str(errors[0])


def test_a_rank_that_fails_does_not_wait_for_others_first(world: World) -> None:
    _, text = world.run(fail_while_a_lane_waits, 2)
    assert "rank 1 failed, and was itself at gather the weights of h.0: KeyboardInterrupt" in text


# --------------------------------------------------------------------------------------------------------- in training


def read_weights(session: Session, batch: torch.Tensor) -> None:
    session.model.state_dict()


def save(session: Session, batch: torch.Tensor) -> None:
    session.save("never written")


def evaluate(session: Session, batch: torch.Tensor) -> None:
    with torch.no_grad():
        loss_of(session.model, batch)


def load_weights(session: Session, batch: torch.Tensor) -> None:
    session.model.load_state_dict(build(seed=4)[0].state_dict())


def one_backward_more(session: Session, batch: torch.Tensor) -> None:
    loss_of(session.model, batch).backward()


def drop_gradients(session: Session, batch: torch.Tensor) -> None:
    session.model.zero_grad()


def zero_gradients(session: Session, batch: torch.Tensor) -> None:
    session.model.zero_grad(set_to_none=False)


def replace_a_gradient(session: Session, batch: torch.Tensor) -> None:
    parameter = next(session.model.parameters())
    parameter.grad = torch.ones_like(parameter)


def change_an_option(session: Session, batch: torch.Tensor) -> None:
    assert session.optimizer is not None
    session.optimizer.param_groups[0]["lr"] *= 2


def end(session: Session, batch: torch.Tensor) -> None:
    raise StopIteration


def train_otherwise(place: Place, otherwise: Callable[..., None], who: int, home: str) -> None:
    """One rank does something more between a backward and its step."""
    model, optimizer = build()
    with session_of(place, model, optimizer, home=home, wait_timeout_s=DEADLINE_S) as session:
        for step, batch in enumerate(batches(4)):
            part = own_part(batch, place.rank, 2)
            loss_of(model, part).backward()
            if step == 1 and place.rank == who:
                try:
                    otherwise(session, part)
                except StopIteration:
                    break
            session.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    "otherwise",
    [
        read_weights, load_weights, save, evaluate, one_backward_more, drop_gradients, zero_gradients,
        replace_a_gradient, change_an_option, end,
    ],
)  # fmt: skip
def test_what_one_rank_does_alone_is_an_error_on_all_that_names_both_sides(
    world: World, otherwise: Callable[..., None], who: int
) -> None:
    for outcome in world.outcomes(train_otherwise, 2, otherwise, who, "host"):
        assert isinstance(outcome.error, OffloadError), outcome.output
        assert "rank 0: " in str(outcome.error)
        assert "rank 1: " in str(outcome.error)


def join_otherwise(place: Place) -> list[str]:
    """What differs on rank 1, of the arguments, the model or the optimizer."""

    def freeze(model: Any, optimizer: Any) -> Any:
        for block in model.blocks:
            block.experts[place.rank].requires_grad_(False)
        return session_of(place, model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad))

    def regroup(model: Any, optimizer: Any) -> Any:
        first, second = model.blocks[0].experts
        groups = [first, second] if place.rank else [second, first]
        return session_of(place, model, torch.optim.AdamW([{"params": group.parameters()} for group in groups]))

    def begin(model: Any, optimizer: Any) -> Any:
        if place.rank == 0:
            loss_of(model, next(batches(1))).backward()
            optimizer.step()
            optimizer.zero_grad()
        return session_of(place, model, optimizer)

    def clip(model: Any, optimizer: Any) -> Any:
        return session_of(place, model, optimizer, max_grad_norm=1.0 + place.rank)

    texts = []
    for wrong in (freeze, regroup, begin, clip):
        torch.manual_seed(3)
        model = Model()
        try:
            with wrong(model, torch.optim.AdamW(model.parameters())):
                texts.append("")
        except RanksDivergedError as error:
            texts.append(str(error))
    return texts


def test_ranks_that_would_mix_different_values_are_refused_at_the_start(world: World) -> None:
    for frozen, grouped, begun, clipped in world.run(join_otherwise, 2):
        assert "ranks [1] differ from rank 0 in the model, or which of its parameters" in frozen
        assert "ranks [1] differ from rank 0 in the model, or which of its parameters" in grouped
        assert "what the optimizer knows of earlier steps" in begun
        assert "the arguments of offload.enable" in clipped


def find_no_folder_on_one(place: Place) -> None:
    model, optimizer = build()
    folder = place.folder / "swap"
    if place.rank == 0:
        folder.mkdir()
    offload.enable(
        model, optimizer, device="cpu", device_memory="8MiB", host_memory="64MiB", wait_timeout_s=DEADLINE_S,
        disk=folder if place.rank == 0 else folder / "of another node",
    )  # fmt: skip


def test_what_one_rank_is_refused_the_others_are_told(world: World) -> None:
    first, second = world.outcomes(find_no_folder_on_one, 2)
    assert isinstance(first.error, RankFailedError), first.output
    assert "rank 1 failed" in str(first.error)
    assert "of another node' is not a folder" in str(first.error)
    assert "is not a folder" in str(second.error)
