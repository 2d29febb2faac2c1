"""Folders whose file system clones files: real ones where they can be mounted, else one that copies instead.

Owns: these, and the gate at which a save beside training is held.
Does not: save.
"""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.disk import clone
from offload.units import MIB
from tests.doubles.small_disk import file_system_of, may_mount

KINDS = ["copying", *(kind for kind in ("btrfs", "xfs") if may_mount(kind))]
"""Not a skip: a machine that cannot mount has fewer cases."""

SAVER = "offload-checkpoint"


def copy_range(source: int, target: int, offset: int, num_bytes: int) -> None:
    """What `clone_range` does, the slow way: also for descriptors of direct I/O."""
    with mmap.mmap(-1, num_bytes) as pages:
        assert os.preadv(source, [pages], offset) == num_bytes
        assert os.pwritev(target, [pages], offset) == num_bytes


@contextlib.contextmanager
def cloning_disk(kind: str, at: Path, num_bytes: int = 384 * MIB) -> Iterator[Path]:
    """A folder for swap files."""
    at.mkdir(exist_ok=True)
    if kind == "copying":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clone, "clone_range", copy_range)
            yield at
    else:
        with file_system_of(num_bytes, at, kind) as folder:
            yield folder


class Gate:
    """Holds the thread that saves beside training before each write: one goes on for each `let`, all after `open`."""

    def __init__(self) -> None:
        self._turns = threading.Semaphore(0)
        self._is_open = threading.Event()
        self._fails: OSError | None = None
        self._arrived = threading.Semaphore(0)
        self._real = os.pwrite

    def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        """In the place of os.pwrite."""
        if threading.current_thread().name == SAVER:
            self._arrived.release()
            if not self._is_open.is_set():
                self._turns.acquire()
            if self._fails is not None:
                raise self._fails
        return self._real(descriptor, data, offset)

    def wait_for_write(self) -> None:
        """Until one more write stands at the gate, or has passed it."""
        assert self._arrived.acquire(timeout=60)

    def let(self) -> None:
        """One write goes on."""
        self._turns.release()

    def open(self, error: OSError | None = None) -> None:
        """All go on, or fail."""
        self._fails = error
        self._is_open.set()
        self._turns.release()


@contextlib.contextmanager
def gate() -> Iterator[Gate]:
    one = Gate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", one.pwrite)
        try:
            yield one
        finally:
            one.open()
