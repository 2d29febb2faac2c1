"""Saved by W ranks, loaded by V, in other chunks and other encodings: the same bits wherever the encoding has them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.checkpoint.format.load import Loaded, load
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.save import CheckpointJob, Extras, Saved
from offload.checkpoint.format.state import Item, Kind, StateTensor
from tests.checkpoint.memory import (
    Sink,
    Source,
    State,
    buffer,
    fp32_moment,
    frozen,
    load_into,
    put_master,
    put_moment,
    random_state,
    recoded,
    save,
    small_model,
    trainable,
)

WORLD_SIZES = (1, 2, 3, 4)
DEADLINE_S = 30.0


class ThreadRanks:
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, world_size: int, shared: tuple[list[str], threading.Barrier]) -> None:
        self.rank = rank
        self.world_size = world_size
        self._texts, self._barrier = shared

    def exchange(self, text: str) -> Sequence[str]:
        self._texts[self.rank] = text
        self._barrier.wait(DEADLINE_S)
        texts = list(self._texts)
        self._barrier.wait(DEADLINE_S)  # nobody overwrites a text that another has not read yet
        return texts


def on_ranks(world_size: int, work: Callable[[ThreadRanks], object]) -> list[object]:
    shared = ([""] * world_size, threading.Barrier(world_size))
    with ThreadPoolExecutor(world_size) as executor:
        futures = [executor.submit(work, ThreadRanks(rank, world_size, shared)) for rank in range(world_size)]
        return [future.exception() or future.result() for future in futures]


def save_by(
    world_size: int,
    root: Path,
    state: State,
    *,
    chunk_numel: int = 512,
    extra: dict[str, object] | None = None,
    **options: object,
) -> list[Saved]:
    def work(ranks: ThreadRanks) -> Saved:
        source = Source(state, ranks.rank, ranks.world_size, chunk_numel)
        extras = Extras(extra or {}, {"rank": ranks.rank})
        return CheckpointJob(root, source, step=3, ranks=ranks, extras=extras, **options).run()

    return on_ranks(world_size, work)


def load_by(world_size: int, path: Path, items: Sequence[Item], *, chunk_numel: int = 512) -> tuple[State, set[Loaded]]:
    """One state, to which each rank gives its share."""
    state, reports = Sink(items).state, set()
    for rank in range(world_size):
        sink = Sink(items, rank, world_size, chunk_numel)
        sink.state = state
        with Checkpoint(path) as checkpoint:
            reports.add(load(checkpoint, sink))
        assert sink.num_writes == len(sink.runs())
    return state, reports


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, State]]:
    """A checkpoint of each world size, made once."""
    made: dict[int, tuple[Path, State]] = {}

    def get(world_size: int) -> tuple[Path, State]:
        if world_size not in made:
            root = tmp_path_factory.mktemp(f"by-{world_size}")
            state = random_state(small_model(split=True, moments="8bit"), np.random.default_rng(world_size))
            save_by(world_size, root, state)
            made[world_size] = root, state
        return made[world_size]

    return get


@pytest.mark.parametrize("loads", WORLD_SIZES)
@pytest.mark.parametrize("saves", WORLD_SIZES)
def test_state_is_the_same_bit_for_bit_at_every_pair_of_world_sizes(
    saved_by: Callable[[int], tuple[Path, State]], saves: int, loads: int
) -> None:
    path, state = saved_by(saves)
    loaded, reports = load_by(loads, path, state.items, chunk_numel=256)
    assert loaded.same_bits(state)
    assert reports == {Loaded(exact=True, notes=())}


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_chunks_of_another_size_and_ranks_of_another_number_change_no_bit(
    tmp_path: Path, rng: np.random.Generator, moments: str
) -> None:
    state = random_state([trainable("w", (97, 53), moments=moments), frozen("f", (3000,)), buffer("b", (7,))], rng)
    save_by(3, tmp_path, state, chunk_numel=768, file_bytes=4096)
    for world_size, chunk_numel in ((1, 256), (2, 100), (4, 1 << 20)):
        loaded, _ = load_by(world_size, tmp_path, state.items, chunk_numel=chunk_numel)
        assert loaded.same_bits(state)


def test_every_rank_gets_the_user_data_and_its_own_random_states(tmp_path: Path, rng: np.random.Generator) -> None:
    save_by(3, tmp_path, random_state(small_model(), rng), extra={"epoch": 2, "t": torch.arange(4)})
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.world_size == 3
        assert [checkpoint.rank_extra(rank) for rank in range(3)] == [{"rank": rank} for rank in range(3)]
        extra = checkpoint.extra()
        assert (extra["epoch"], extra["t"].tolist()) == (2, [0, 1, 2, 3])
        with pytest.raises(ValueError, match=f"{checkpoint.folder} was saved by ranks 0 to 2; rank 3 is none"):
            checkpoint.rank_extra(3)


def test_a_rank_that_fails_makes_all_ranks_fail_and_leaves_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(), rng)
    save_by(2, tmp_path, state)
    before = sorted(path.name for path in tmp_path.iterdir())

    class Failing(Source):
        def values(self) -> object:
            raise RuntimeError("the disk of rank 1 is gone")

    def work(ranks: ThreadRanks) -> Saved:
        kind = Failing if ranks.rank == 1 else Source
        return CheckpointJob(tmp_path, kind(state, ranks.rank, 2), step=4, ranks=ranks).run()

    first, second = on_ranks(2, work)
    assert "failed on rank 1: RuntimeError: the disk of rank 1 is gone" in str(first)
    assert str(second) == "the disk of rank 1 is gone"
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_ranks_that_disagree_about_an_item_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state([trainable("w", (600,))], rng)
    other = replace(state, items=[replace(state.items[0], step=9)])

    def work(ranks: ThreadRanks) -> Saved:
        return CheckpointJob(tmp_path, Source((state, other)[ranks.rank], ranks.rank, 2), step=4, ranks=ranks).run()

    assert all("rank 1 has" in str(error) and "'w'" in str(error) for error in on_ranks(2, work))


def test_runs_that_leave_a_hole_are_never_published(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state([trainable("w", (600,))], rng)
    with pytest.raises(ValueError, match=r"state tensor 'master' of 'w' .* are in no chunk"):
        CheckpointJob(tmp_path, Source(state, rank=0, world_size=2), step=1).run()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# --------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("splits", [True, False])
def test_a_split_master_and_a_plain_one_hold_the_same_bits(
    tmp_path: Path, rng: np.random.Generator, splits: bool
) -> None:
    stored, wanted = small_model(split=not splits), small_model(split=splits)
    plain = random_state(small_model(), rng)
    masters = {item.name: plain.state_tensors[item.name, "master"] for item in stored if item.kind is Kind.TRAINABLE}
    save(tmp_path, recoded(plain, stored, masters))
    loaded, report = load_into(tmp_path, wanted)
    assert loaded.same_bits(recoded(plain, wanted, masters))
    assert report.exact


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_moments_in_fewer_bits_become_the_fp32_values_that_they_stand_for(
    tmp_path: Path, rng: np.random.Generator, moments: str
) -> None:
    item = trainable("w", (999,), moments=moments)
    state = random_state([item], rng)
    save(tmp_path, state)
    loaded, report = load_into(tmp_path, [trainable("w", (999,))])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(loaded.state_tensors["w", name], fp32_moment(state, item, name))
    assert report.exact


@pytest.mark.parametrize(("stored", "wanted"), [("fp32", "bf16"), ("fp32", "8bit"), ("8bit", "bf16"), ("bf16", "8bit")])
def test_a_change_of_encoding_that_rounds_is_reported(
    tmp_path: Path, rng: np.random.Generator, stored: str, wanted: str
) -> None:
    state = random_state([trainable("w", (999,), moments=stored)], rng)
    save(tmp_path, state)
    loaded, report = load_into(tmp_path, [trainable("w", (999,), moments=wanted)])
    assert torch.equal(loaded.state_tensors["w", "master"], state.state_tensors["w", "master"])
    assert not report.exact
    assert any(note.startswith("exp_avg stored as") for note in report.notes)
    # the kernels that the session would use give the same bits
    target, expected = trainable("w", (999,), moments=wanted), State([])
    put_master(expected, target, state.state_tensors["w", "master"])
    for name in ("exp_avg", "exp_avg_sq"):
        put_moment(expected, target, name, fp32_moment(state, state.items[0], name))
    assert loaded.same_bits(expected)


def test_a_frozen_parameter_that_is_to_be_trained_starts_with_moments_of_zero(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    state = random_state([frozen("w", (300,))], rng)
    save(tmp_path, state)
    loaded, report = load_into(tmp_path, [trainable("w", (300,))])
    assert torch.equal(loaded.state_tensors["w", "master"], state.state_tensors["w", "weights"].float())
    assert not loaded.state_tensors["w", "exp_avg_sq"].any()
    assert report.notes == ("frozen in the checkpoint, trainable now, with moments of 0: w",)


@pytest.mark.parametrize("split", [True, False])
def test_a_trained_parameter_that_is_to_be_frozen_keeps_its_working_weights(
    tmp_path: Path, rng: np.random.Generator, split: bool
) -> None:
    state = random_state([trainable("w", (300,), split=True)], rng)
    weights = state.state_tensors["w", "weights"]
    if not split:
        master = (weights.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
        state = random_state([trainable("w", (300,))], rng)
        put_master(state, state.items[0], master)
    save(tmp_path, state)
    loaded, _ = load_into(tmp_path, [frozen("w", (300,))])
    assert torch.equal(loaded.state_tensors["w", "weights"], weights)


def test_moments_of_another_optimizer_are_refused_with_their_names(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = save(tmp_path, random_state([trainable("w", (300,))], rng))
    other = trainable("w", (300,))
    other = replace(other, state_tensors=(*other.state_tensors, StateTensor("momentum", torch.float32)))
    with pytest.raises(ValueError, match=rf"{saved.folder}: 'w': the optimizer keeps 'momentum', the checkpoint has"):
        load_into(tmp_path, [other])
