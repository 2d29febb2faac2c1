"""Swap files on a real disk and in shared memory, page-aligned tensors, and queues over them."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from offload.concurrency.lanes import Lanes
from offload.concurrency.timeline import Timeline
from offload.disk import nameless
from offload.disk.io_queue import IoQueue, QueueOptions, TransferQueue
from offload.disk.swap_file import SwapFiles
from offload.disk.transfer import REAL, OsFunctions
from offload.memory.ledger import Ledger
from offload.memory.region import Region
from offload.units import KIB
from tests.doubles.lane_queue import LaneQueue
from tests.doubles.small_disk import may_mount


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests on a file system of their own exist only where this user may mount one: not a skip."""
    needing = [item for item in items if "small_disk" in getattr(item, "fixturenames", ())]
    absent = needing if needing and not may_mount() else []
    absent = absent + [item for item in items if item.name.endswith("[NOTSET]")]  # parametrized by no file system
    if absent:
        items[:] = [item for item in items if item not in absent]
        config.hook.pytest_deselected(items=absent)


@pytest.fixture(params=["disk", "shared-memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on the disk of the tests, and one on tmpfs, which older kernels refuse direct I/O on."""
    if request.param == "disk":
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no file can be without a name: swap files lie in folders with a lock."""
    monkeypatch.setattr(nameless, "can_be_had", lambda folder: False)


@pytest.fixture
def timeline() -> Timeline:
    return Timeline()


@pytest.fixture
def lanes(timeline: Timeline) -> Iterator[Lanes]:
    lanes = Lanes(timeline, wait_timeout_s=30)
    yield lanes
    lanes.close()


@pytest.fixture
def tensors() -> Iterator[Callable[[int], torch.Tensor]]:
    """Makes page-aligned torch.uint8 tensors. Closing their regions proves that nothing keeps them alive."""
    regions: list[Region] = []
    ledger = Ledger({})

    def make(num_bytes: int) -> torch.Tensor:
        regions.append(Region(num_bytes, owner="test", ledger=ledger))
        return regions[-1].tensor

    yield make
    for region in regions:
        region._undo()  # not close(): the test's own variables are still alive here


@pytest.fixture
def queues(lanes: Lanes, timeline: Timeline) -> Iterator[Callable[..., TransferQueue]]:
    """Makes queues and closes them."""
    made: list[TransferQueue] = []

    def make(
        files: SwapFiles,
        kind: str = "io",
        os_functions: OsFunctions = REAL,
        depth: int = 4,
        request_bytes: int = 64 * KIB,
    ) -> TransferQueue:
        if kind == "io":
            queue: TransferQueue = IoQueue(
                files,
                lanes=lanes,
                options=QueueOptions(depth=depth, request_bytes=request_bytes),
                os_functions=os_functions,
            )
        else:
            queue = LaneQueue(files, lanes=lanes, os_functions=os_functions)
        made.append(queue)
        return queue

    yield make
    for queue in made:
        queue.close()


@pytest.fixture
def swap(tmp_path: Path) -> Iterator[Callable[..., SwapFiles]]:
    """Makes swap files of given sizes below `tmp_path` and removes them."""
    made: list[SwapFiles] = []

    def make(*bytes_by_file: int, root: Path = tmp_path) -> SwapFiles:
        folders = [root / f"disk{len(made)}-{i}" for i in range(len(bytes_by_file))]
        for path in folders:
            path.mkdir()
        made.append(SwapFiles.create(folders, run_id="test", rank=0, bytes_by_file=bytes_by_file))
        return made[-1]

    yield make
    for files in made:
        files.close()
