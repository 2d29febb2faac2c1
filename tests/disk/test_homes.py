"""A home on disk orders its own reads and writes, knows its zeros, and hands new weights to the fetch that waits."""

from collections.abc import Callable, Iterator

import pytest
import torch

from offload.concurrency.lanes import Reason
from offload.disk.layout import Extent
from offload.disk.swap_file import SwapFiles
from offload.errors import InternalError
from offload.storage.homes import Chunk, DiskHome
from offload.units import KIB
from tests.doubles.lane_queue import LaneQueue
from tests.doubles.turns import TurnLanes, eager

NUM_BYTES = 16 * KIB
PAGE = 4 * KIB
CHUNK = Chunk(0, "block", True, 0, 0, NUM_BYTES // 2)

MakeTensor = Callable[[int], torch.Tensor]


def last_write_first(runnable: list[str]) -> str:
    """Writes run when nobody else can, the newest before the others."""
    others = [name for name in runnable if not name.startswith("write")]
    return eager(others or runnable[::-1])


@pytest.fixture
def turns() -> Iterator[TurnLanes]:
    """A read that does not wait for a write overtakes it, and so does a second write."""
    lanes = TurnLanes(last_write_first)
    yield lanes
    lanes.close()


@pytest.fixture
def home(turns: TurnLanes, swap: Callable[..., SwapFiles]) -> Iterator[DiskHome]:
    queue = LaneQueue(swap(NUM_BYTES), lanes=turns)
    yield DiskHome(CHUNK, Extent(0, 0, NUM_BYTES), queue=queue, lanes=turns)
    queue.close()


def test_a_read_gives_what_the_write_before_it_wrote(home: DiskHome, turns: TurnLanes, tensors: MakeTensor) -> None:
    source, into = tensors(NUM_BYTES), tensors(NUM_BYTES)
    for value in (1, 2, 3):
        home.write(source.fill_(value), "write")
        turns.wait(home.read(into.zero_(), "read"), Reason.READ)
        assert set(into.tolist()) == {value}


def test_of_two_writes_the_second_stays(home: DiskHome, turns: TurnLanes, tensors: MakeTensor) -> None:
    """Two lanes take the writes of a queue: only the home puts two of one extent in order."""
    writes = [home.write(tensors(NUM_BYTES).fill_(value), "write") for value in (1, 2)]
    turns.wait(turns.all_of(writes, "both"), Reason.DRAIN)
    into = tensors(NUM_BYTES)
    turns.wait(home.read(into, "read"), Reason.READ)
    assert set(into.tolist()) == {2}


def test_zeros_are_neither_written_nor_read_but_are_there(
    home: DiskHome, turns: TurnLanes, tensors: MakeTensor
) -> None:
    into = tensors(NUM_BYTES).fill_(7)
    home.write(tensors(NUM_BYTES).fill_(1), "write", zeros_from=PAGE)
    assert home.stored == Extent(0, 0, PAGE)
    turns.wait(home.read(into, "read"), Reason.READ)
    assert set(into[:PAGE].tolist()) == {1}
    assert set(into[PAGE:].tolist()) == {0}
    home.write(tensors(NUM_BYTES).fill_(2), "write")
    assert home.stored == home.extent


@pytest.mark.parametrize("written", ["while a fetch waits", "before"])
def test_a_fetch_that_waits_gets_new_weights_without_a_read(
    written: str, home: DiskHome, turns: TurnLanes, tensors: MakeTensor
) -> None:
    into, published = tensors(NUM_BYTES).zero_(), turns.future("publication")
    if written == "before":
        home.write(tensors(NUM_BYTES).fill_(5), "weights")
        published.resolve()
    fetched = turns.lane("fetch read").submit(lambda: home.read_published(into, "fetch", published), "fetch")
    if written != "before":
        home.write(tensors(NUM_BYTES).fill_(5), "weights")
        published.resolve()
    read = turns.wait(fetched, Reason.READ_ISSUED)
    turns.wait(read, Reason.READ)
    assert set(into.tolist()) == {5}
    read_bytes = sum(totals.num_bytes for lane, totals in turns.timeline.totals().items() if lane.startswith("read"))
    assert read_bytes == (NUM_BYTES if written == "before" else 0)


def test_a_home_on_disk_has_no_memory_to_work_in(home: DiskHome) -> None:
    with pytest.raises(InternalError, match="is stored on disk"):
        _ = home.bytes
