"""State of the next step is read while backward runs: the bits are the same whatever comes between, nothing hangs."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.disk.transfer import REAL, OsFunctions
from offload.errors import OffloadError, SessionFailedError
from offload.optimizer.state_reads import DROPPED
from tests.doubles.clocks import Clocks
from tests.doubles.late import LateLanes
from tests.doubles.turns import TurnLanes, eager, shuffled, slow
from tests.training.programs import OPERATIONS, Run, outcome, running, threads

ON_DISK = ["state on disk", "all on disk"]


def state_reads(run: Run) -> list[str]:
    """Reads of steps so far, by chunk."""
    return [span.name for span in run.session.timeline.spans("read") if span.name.startswith("step")]


@pytest.mark.parametrize("home", ON_DISK)
@pytest.mark.parametrize("step_buffers", [1, 3])
def test_a_backward_reads_as_many_chunks_as_there_are_buffers_and_the_step_reads_only_the_others(
    home: str, step_buffers: int, tmp_path: Path
) -> None:
    with running(TurnLanes(eager), home, tmp_path, step_buffers=step_buffers, accumulate=1) as run:
        for _ in range(3):
            run.session.metrics()
            before = len(state_reads(run))
            run.backward()
            ahead = state_reads(run)[before:]
            run.step()
            run.session.metrics()
            everything = state_reads(run)[before:]
            if home == "state on disk":
                assert len(ahead) == step_buffers
                assert everything[:step_buffers] == ahead
                assert len(everything) == len(set(everything))
        assert run.session.timeline.counter(DROPPED) == 0


def test_without_overlap_backward_reads_no_state(tmp_path: Path) -> None:
    for overlap in ("off", "backward"):
        options: Any = {"overlap": overlap, "max_grad_norm": None, "accumulate": 2}
        with running(TurnLanes(eager), "state on disk", tmp_path, **options) as run:
            run.backward()
            assert state_reads(run) == []
            run.train()
            assert state_reads(run) != []


def test_as_many_bytes_are_read_with_and_without_reading_ahead(tmp_path: Path) -> None:
    num_bytes = {}
    for overlap in ("off", "forward"):
        with running(threads(), "state on disk", tmp_path, overlap=overlap) as run:
            for _ in range(3):
                run.train()
            num_bytes[overlap] = run.session.metrics()["bytes_moved"]["read"]
    assert num_bytes["forward"] == num_bytes["off"]


ORDERS: dict[str, Callable[[], Any]] = {
    "threads": threads,
    "late": LateLanes,
    "eager": lambda: TurnLanes(eager, clocks=Clocks()),
    "slow reads": lambda: TurnLanes(slow("read"), clocks=Clocks()),
    "slow steps": lambda: TurnLanes(slow("step"), clocks=Clocks()),
}


@pytest.mark.parametrize("home", ON_DISK)
def test_whatever_comes_between_the_bits_are_those_of_no_overlap(home: str, tmp_path: Path) -> None:
    program = ["train", *(operation for operation in OPERATIONS for _ in range(2)), "train"]
    expected = outcome(threads(), home, tmp_path, program, overlap="off")
    for name, lanes in ORDERS.items():
        assert outcome(lanes(), home, tmp_path, program) == expected, name


@pytest.mark.parametrize("number", range(40 if os.environ.get("OFFLOAD_STRESS") else 3))
def test_a_random_program_in_a_random_order_neither_hangs_nor_changes_bits(
    number: int, seed: int, tmp_path: Path
) -> None:
    chosen = random.Random(seed)
    program = chosen.choices(list(OPERATIONS), k=8)
    home = chosen.choice(ON_DISK)
    options = {"step_buffers": chosen.choice([0, 1, 2, 4]), "accumulate": chosen.choice([None, 2])}
    expected = outcome(threads(), home, tmp_path, program, overlap="off", **options)
    found = outcome(TurnLanes(shuffled(seed), clocks=Clocks()), home, tmp_path, program, **options)
    assert found == expected, (program, home, options)


def test_what_is_read_ahead_is_dropped_before_others_use_its_buffers(tmp_path: Path) -> None:
    for lanes in [*ORDERS.values(), lambda: TurnLanes(slow("step read"), clocks=Clocks())]:
        with running(lanes(), "state on disk", tmp_path, step_buffers=2) as run:
            run.backward()
            with run.session.gathered() as masters:
                assert all(bool(master.isfinite().all()) for master in masters.values())
            assert run.session.timeline.counter(DROPPED) == 2
            run.step()


def test_every_chunk_is_verified_by_its_checksum_though_masters_change_after_it_was_read(tmp_path: Path) -> None:
    program = ["train", "edit", "edit", "overflow", "edit", "train"]
    expected = outcome(threads(), "state on disk", tmp_path, program, overlap="off")
    assert outcome(threads(), "state on disk", tmp_path, program, checksum=True) == expected


@pytest.mark.parametrize("give_back", [False, True])
@pytest.mark.parametrize("home", ON_DISK)
def test_a_session_that_never_steps_again_closes_also_where_a_graph_outlives_it(
    home: str, give_back: bool, tmp_path: Path
) -> None:
    for lanes in ORDERS.values():
        with running(lanes(), home, tmp_path) as run:
            run.train()
            run.backward()
            graph = run.forward()
            run.session.close(give_back=give_back)
        assert list(tmp_path.iterdir()) == []
        assert graph.requires_grad


class FailingReads:
    """preadv that fails once armed."""

    def __init__(self) -> None:
        self.armed = False

    def __call__(self, descriptor: int, views: Any, offset: int) -> int:
        if self.armed:
            raise OSError(5, "Input/output error")
        return REAL.preadv(descriptor, views, offset)


def train_until_it_fails(run: Run, reads: FailingReads) -> None:
    run.train()
    run.session.metrics()
    reads.armed = True
    run.backward()
    run.step()
    run.evaluate()


def test_a_failed_read_ahead_fails_the_session_and_names_the_disk(tmp_path: Path) -> None:
    for make in ORDERS.values():
        reads = FailingReads()
        os_functions = OsFunctions(preadv=reads, pwritev=REAL.pwritev)
        with (
            pytest.raises((OffloadError, SessionFailedError), match="Input/output error"),
            running(make(), "state on disk", tmp_path, os_functions=os_functions) as run,
        ):
            train_until_it_fails(run, reads)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions_have_the_same_bits(precision: str, tmp_path: Path) -> None:
    program = ["train", "overflow", "train", "edit", "accumulate"]
    options: Any = {"precision": precision, "device_memory": "40KiB", "host_memory": "300KiB"}
    expected = outcome(threads(), "host", tmp_path, program, overlap="off", **options)
    assert outcome(threads(), "host", tmp_path, program, **options) == expected
    assert outcome(TurnLanes(shuffled(3), clocks=Clocks()), "host", tmp_path, program, **options) == expected
