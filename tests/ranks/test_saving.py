"""Ranks save and load together: the same bits at every pair of world sizes, and what fails on one fails on all.

Four pairs of world sizes run always, all sixteen of 1 to 4 under OFFLOAD_STRESS=1, each in memory and on disk.
"""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import offload
from offload.checkpoint.format import open_files
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.reader import Checkpoint
from offload.disk import clone, nameless
from offload.errors import RanksDivergedError
from offload.session import Session
from tests.doubles.cloning_disks import copy_range, gate
from tests.ranks.training import batches, build, loss_of, own_part, session_of
from tests.ranks.world import Place, World

STRESS = bool(os.environ.get("OFFLOAD_STRESS"))
SOME = [(1, [2], "host", "fp32"), (2, [1, 2], "disk", "bf16"), (3, [2], "disk", "fp32")]
EVERY = [(saves, [1, 2, 3, 4], *where) for saves in (1, 2, 3, 4) for where in (("host", "bf16"), ("disk", "fp32"))]


@contextmanager
def running(place: Place, home: str = "host", **options: Any) -> Iterator[tuple[Session, Any]]:
    """A session, and what steps it: each step has the batch of its number."""
    model, optimizer = build()
    model.register_buffer("seen", torch.arange(5))
    random.seed(place.rank)
    every = list(batches(8))

    def step(number: int) -> None:
        session.backward(loss_of(model, own_part(every[number], place.rank, place.world_size)))
        session.step()
        optimizer.zero_grad()

    with session_of(place, model, optimizer, home=home, **options) as session:
        yield session, step


def flat(session: Session) -> dict[str, Tensor]:
    """Weights and moments."""
    state = session.state_dict()
    found = {name: value for name, value in state["model"].items() if isinstance(value, Tensor)}
    for index, kept in state["optimizer"]["state"].items():
        found |= {f"{index}.{name}": torch.as_tensor(value) for name, value in kept.items()}
    return found


def same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def save_and_go_on(place: Place, root: Path, home: str, precision: str) -> Any:
    with running(place, home, precision=precision) as (session, step):
        step(0)
        step(1)
        saved = session.save(root, extra={"by": place.rank})
        drawn, state = random.random(), flat(session)
        step(2)
        return saved.folder.name, state, drawn, flat(session)


def load_and_go_on(place: Place, root: Path, home: str, precision: str) -> Any:
    with running(place, home, precision=precision) as (session, step):
        step(3)
        loaded = session.load(root)
        drawn, state = random.random(), flat(session)
        step(2)
        return loaded, state, drawn, flat(session)


@pytest.mark.parametrize(("saves", "loaded_by", "home", "precision"), EVERY if STRESS else SOME)
def test_saved_by_so_many_ranks_and_loaded_by_others_the_state_has_the_same_bits(
    world: World, saves: int, loaded_by: list[int], home: str, precision: str, tmp_path: Path
) -> None:
    by_rank = world.run(save_and_go_on, saves, tmp_path, home, precision)
    name, state, _, gone_on = by_rank[0]
    assert name == "step-00000002"
    assert all(same_bits(other[1], state) for other in by_rank)
    for loads in loaded_by:
        for rank, result in enumerate(world.run(load_and_go_on, loads, tmp_path, home, precision)):
            loaded, found, drawn, resumed = result
            assert same_bits(found, state)
            assert (loaded.step, loaded.extra) == (2, {"by": 0})
            assert loaded.exact == (saves == loads)
            if rank < saves:
                assert drawn == by_rank[rank][2], "each rank has random states of its own"
            if saves == loads:
                assert same_bits(resumed, gone_on)


def save_beside(place: Place, root: Path, home: str) -> Any:
    clone.clone_range = copy_range
    with running(place, home) as (session, step), gate() as writes:
        step(0)
        session.save(root / "at once")
        result = session.save(root / "beside", wait=False)
        for number in range(1, 4):
            step(number)
        was_durable = result.durable
        has_clone = any(f.pid == os.getpid() and f.kind == "clone of the swap file" for f in nameless.open_files())
        writes.open()
        name = result.folder.name
        session.load(root / "at once")
        at_once = flat(session)
        session.load(root / "beside")
        return was_durable, has_clone, name, same_bits(flat(session), at_once)


@pytest.mark.parametrize("home", ["device", "disk"])
def test_ranks_train_on_while_their_state_is_written(world: World, home: str, tmp_path: Path) -> None:
    assert world.run(save_beside, 2, tmp_path, home) == [(False, home == "disk", "step-00000001", True)] * 2


def fail_alone(place: Place, root: Path) -> Any:
    told = []
    with running(place) as (session, step):
        step(0)
        extra = {"cannot": object()} if place.rank == 1 else {}
        for options in ({"extra": extra}, {"step": 3 + place.rank}):
            with pytest.raises((CheckpointError, RanksDivergedError)) as raised:
                session.save(root, **options)
            told.append(str(raised.value))
        session.save(root)
        step(1)
        before = flat(session)
        if place.rank == 1:  # what it reads is not what is there
            open_files.OpenFiles.get = damaged
        with pytest.raises(CheckpointError) as raised:
            session.load(root)
        told.append(f"{type(raised.value).__name__}: {raised.value}")
        assert same_bits(flat(session), before)
        step(2)
    return told


def damaged(self: Any, name: str) -> Any:
    raise CorruptCheckpointError(f"{name} is damaged")


def test_what_is_refused_on_one_rank_is_refused_on_all_and_training_goes_on(world: World, tmp_path: Path) -> None:
    first, second = world.run(fail_alone, 2, tmp_path / "run")
    assert "failed on rank 1, so on all: CheckpointError: extra['cannot']" in first[0]
    assert second[0].startswith("extra['cannot']")
    assert all("rank 1 saves with {'step': 4" in told[1] for told in (first, second))
    assert "failed on rank 1" in first[2]
    assert second[2].startswith("CorruptCheckpointError")
    with Checkpoint(tmp_path / "run") as checkpoint:
        checkpoint.verify()


def load_where_one_finds_damage(place: Place, root: Path) -> Any:
    with running(place) as (session, step):
        states = []
        for number in range(2):
            step(number)
            session.save(root)
            states.append(flat(session))
        step(2)
        if place.rank == 1:
            open_files.OpenFiles.get = damaged_in_the_newest
        with pytest.raises(CorruptCheckpointError):
            session.load(root)
        loaded = session.load(root, on_corrupt="previous")
        assert same_bits(flat(session), states[0])
        step(2)
    return loaded.step


whole_get = open_files.OpenFiles.get


def damaged_in_the_newest(self: Any, name: str) -> Any:
    opened = whole_get(self, name)
    return damaged(self, name) if opened.path.parent.name == "step-00000002" else opened


def test_ranks_fall_back_together_where_one_of_them_finds_damage(world: World, tmp_path: Path) -> None:
    assert world.run(load_where_one_finds_damage, 2, tmp_path / "run") == [1, 1]


def signal_one(place: Place, root: Path, number: int) -> Any:
    calls: list[int] = []
    if number == signal.SIGUSR1:
        signal.signal(number, lambda number, frame: calls.append(number))
    with running(place) as (session, step):
        session.save_on_signal(number, root, extra=lambda: {"epoch": 1})
        step(0)
        if place.rank == 1:
            signal.raise_signal(number)
        step(1)
        state = flat(session)
        step(2)
        loaded = session.load(root)
        assert same_bits(flat(session), state)
    return calls, loaded.step, loaded.extra


def test_a_signal_to_one_rank_makes_all_save_the_same_step_and_act_alike(world: World, tmp_path: Path) -> None:
    answered = world.run(signal_one, 2, tmp_path / "handled", signal.SIGUSR1)
    assert answered == [([signal.SIGUSR1], 2, {"epoch": 1})] * 2
    ended = world.outcomes(signal_one, 2, tmp_path / "fatal", signal.SIGTERM)
    assert [outcome.status for outcome in ended] == [-signal.SIGTERM] * 2
    with Checkpoint(tmp_path / "fatal") as checkpoint:
        checkpoint.verify()
        assert checkpoint.step == 2


def export(place: Place, root: Path) -> Any:
    with running(place, "disk") as (session, step):
        step(0)
        state = session.state_dict(optimizer=False)["model"]
        session.save(root / "run")
        exported = session.export(root / f"by-{place.world_size}")
        return exported, state


def test_an_export_of_ranks_holds_the_weights_that_a_checkpoint_of_theirs_exports(world: World, tmp_path: Path) -> None:
    (exported, state), (other, _) = world.run(export, 2, tmp_path)
    assert exported == other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by-2", "run"]
    model, _ = build()
    model.register_buffer("seen", torch.arange(5))
    with offload.enable(model, None, device="cpu", device_memory="64MiB", precision="fp32") as session:
        session.load(exported.folder)
        loaded = session.state_dict()["model"]
    assert same_bits(loaded, state)


# ---------------------------------------------------------------------------------------------------- one checkpoint


def load_what_each_finds(place: Place) -> str:
    """The newest of two checkpoints differs between ranks, as where one sees a shared folder late."""
    model, optimizer = build()
    with session_of(place, model, optimizer) as session:
        for number, batch in enumerate(batches(2)):
            loss_of(model, own_part(batch, place.rank, place.world_size)).backward()
            session.step()
            optimizer.zero_grad()
            session.save(place.folder / f"seen by {number}")
        before = session.weights_sha256()
        with pytest.raises(RanksDivergedError) as caught:
            session.load(place.folder / f"seen by {place.rank}")
        assert session.weights_sha256() == before
    return str(caught.value)


def test_ranks_do_not_load_parts_of_different_checkpoints(world: World) -> None:
    for text in world.run(load_what_each_finds, 2):
        assert "rank 1 finds step 2" in text
        assert "rank 0 finds step 1" in text


def save_under_names_of_their_own(place: Place) -> str:
    model, optimizer = build()
    with session_of(place, model, optimizer) as session:
        with pytest.raises(RanksDivergedError) as caught:
            session.save(place.folder / f"begun at 12:00:0{place.rank}")
        session.save(place.folder / "run")
    assert sorted(path.name for path in place.folder.glob("begun*/*")) == []
    return str(caught.value)


def test_ranks_do_not_save_to_different_folders(world: World) -> None:
    for text in world.run(save_under_names_of_their_own, 2):
        assert "rank 1 saves with" in text
        assert "'folder': 'begun at 12:00:01'" in text
