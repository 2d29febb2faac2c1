"""Clones of swap files: what was there stays, what is written goes on, and no rest is left."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.checkpoint.snapshot import _aligned
from offload.disk.clone import Clones, clone_range, extra_index, has_room, joined
from offload.disk.layout import Extent
from offload.disk.named_folder import leftovers, remove_leftovers
from offload.disk.probe import free_bytes
from offload.disk.swap_file import SwapFiles
from offload.units import MIB
from tests.doubles.cloning_disks import KINDS, cloning_disk

PAGE = 4096
REAL = [kind for kind in KINDS if kind != "copying"]


@pytest.fixture(params=[*KINDS, *(f"{kind}, named" for kind in KINDS)])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SwapFiles]:
    kind, comma, _ = request.param.partition(",")
    if comma:
        request.getfixturevalue("named")
    with (
        cloning_disk(kind, tmp_path / "disk") as folder,
        SwapFiles.create([folder], run_id="a", rank=0, bytes_by_file=[8 * MIB]) as made,
    ):
        yield made


def names_beside(files: SwapFiles) -> list[str]:
    return sorted(path.name for path in files.files[0].folder.iterdir())


def filled(value: int, num_bytes: int = PAGE) -> torch.Tensor:
    return _aligned(num_bytes).fill_(value)


def write(files: SwapFiles, offset: int, value: int, num_bytes: int = PAGE) -> None:
    assert os.pwritev(files.files[0].descriptor, [filled(value, num_bytes).numpy().data], offset) == num_bytes


def read(clones: Clones, extent: Extent) -> set[int]:
    found = _aligned(extent.num_bytes)
    clones.read(extent, found, "test")
    return set(found.tolist())


def test_a_clone_keeps_what_was_there_while_the_swap_file_is_overwritten(files: SwapFiles) -> None:
    first, second = Extent(0, 0, PAGE), Extent(0, MIB, PAGE)
    write(files, 0, 1)
    write(files, MIB, 2)
    clones = Clones.take(files, [first, second])
    assert clones is not None
    write(files, 0, 3)
    assert (read(clones, first), read(clones, second)) == ({1}, {2})
    clones.close()
    clones.close()
    assert names_beside(files) == ([] if not files.files[0].is_named else ["owner.lock", "swap.bin"])


def test_what_is_written_beside_the_clones_is_read_there(files: SwapFiles) -> None:
    write(files, 0, 1)
    clones = Clones.take(files, [Extent(0, 0, PAGE)], extra_bytes=2 * PAGE)
    assert clones is not None
    clones.write(Extent(extra_index(files), PAGE, PAGE), filled(7), "test")
    assert read(clones, Extent(extra_index(files), PAGE, PAGE)) == {7}
    files.close()
    assert not files.files[0].is_named or not files.files[0].folder.exists(), (
        "a session that ends takes all of it along"
    )
    clones.close()


@pytest.mark.parametrize("kind", REAL)
def test_a_real_clone_takes_no_room_until_it_is_overwritten(kind: str, tmp_path: Path) -> None:
    with (
        cloning_disk(kind, tmp_path / "disk") as folder,
        SwapFiles.create([folder], run_id="a", rank=0, bytes_by_file=[64 * MIB]) as files,
    ):
        write(files, 0, 1, 64 * MIB)
        os.sync()
        before = free_bytes(folder)
        clones = Clones.take(files, [Extent(0, 0, 64 * MIB)])
        assert clones is not None
        os.sync()
        assert free_bytes(folder) > before - 4 * MIB
        write(files, 0, 2, 32 * MIB)
        os.sync()
        assert free_bytes(folder) < before - 28 * MIB
        clones.close()


def test_a_file_system_that_cannot_clone_says_so_and_keeps_nothing(tmp_path: Path) -> None:
    """On whatever tests run on: where it can, the clone is right; where it cannot, there is none."""
    with SwapFiles.create([tmp_path], run_id="a", rank=0, bytes_by_file=[PAGE]) as files:
        write(files, 0, 1)
        clones = Clones.take(files, [Extent(0, 0, PAGE)], clone=clone_range)
        if clones is not None:
            assert read(clones, Extent(0, 0, PAGE)) == {1}
            clones.close()
        assert names_beside(files) == []


def test_clones_of_a_dead_run_are_leftovers(tmp_path: Path) -> None:
    own = tmp_path / "offload-x-rank0"
    own.mkdir()
    for name in ("swap.bin", "clone.bin", "copy.bin"):
        (own / name).touch()
    (own / "owner.lock").write_text("pid 1 started 2026-01-01T00:00:00+0000\n")
    assert leftovers(tmp_path) == [own]
    assert remove_leftovers(tmp_path) == [own]
    assert list(tmp_path.iterdir()) == []


def test_extents_that_touch_are_cloned_as_one() -> None:
    extents = [
        Extent(0, 2 * PAGE, PAGE),
        Extent(0, 0, PAGE),
        Extent(0, PAGE, PAGE),
        Extent(1, 0, 0),
        Extent(2, PAGE, PAGE),
    ]
    assert joined(extents) == {0: [(0, 3 * PAGE)], 2: [(PAGE, 2 * PAGE)]}


def test_room_is_asked_for_clones_the_checkpoint_and_all_ranks_of_the_node(tmp_path: Path) -> None:
    with SwapFiles.create([tmp_path], run_id="a", rank=0, bytes_by_file=[PAGE]) as files:
        third = free_bytes(tmp_path) // 3 // PAGE * PAGE
        extents = [Extent(0, 0, third)]

        def room(**options: int) -> bool:
            asked = {"extra_bytes": 0, "checkpoint_bytes": 0} | options
            return has_room(files, extents, checkpoint=tmp_path / "not yet" / "there", **asked)

        assert room()
        assert room(checkpoint_bytes=third // 2)
        assert not room(checkpoint_bytes=2 * third)
        assert not room(extra_bytes=2 * third)
        assert room(num_sharing=2)
        assert not room(num_sharing=3)
