"""One mapping of host memory, and the views of its bytes.

Owns: mapping, first touch, page-locking and unmapping of host memory; the one place where tensors become numpy views.
Does not: lend parts of it (memory/ring.py) or know how pages are locked (device/ gives `register`).
Threads: a region is made and closed by one thread; its tensor may be used by any.
"""

import contextlib
import mmap
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from offload.errors import BudgetError, InternalError
from offload.memory.ledger import Ledger
from offload.units import Tier, format_bytes, round_up

PAGE_BYTES: Final = mmap.PAGESIZE

_ADVICE: Final = ("MADV_HUGEPAGE", "MADV_DONTFORK", "MADV_DONTDUMP")
"""Huge pages: fewer TLB misses and faster registration. Not in forked children: copy-on-write would move pages that a
device or a disk writes to, and a data loader's fork would double the memory. Not in core dumps: they would be huge."""

_VIEWED_AS: Final = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.uint16,
    torch.float16: torch.uint16,
    torch.uint16: torch.uint16,
    torch.int16: torch.int16,
    torch.uint8: torch.uint8,
    torch.int8: torch.int8,
    torch.float64: torch.float64,
}


def map_anonymous(num_bytes: int) -> mmap.mmap:
    """A private anonymous mapping. The only place that maps memory; tests wrap it."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Region:
    """`num_bytes` of page-aligned host memory, touched, charged to `owner`, and page-locked where `register` is given.

    `register(address, num_bytes)` runs after the first touch and returns what undoes it. Keeps the memory alive until
    `close`; without `close`, until the last view of it dies.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        owner: str,
        ledger: Ledger,
        register: Callable[[int, int], Callable[[], None]] | None = None,
    ) -> None:
        self.num_bytes = num_bytes
        self.owner = owner
        self._mapping: mmap.mmap | None = None
        self._tensor: Tensor | None = torch.empty(0, dtype=torch.uint8)
        ledger.charge(Tier.HOST, owner, num_bytes)
        undo = contextlib.ExitStack()
        undo.callback(ledger.discharge, Tier.HOST, owner, num_bytes)
        try:
            if num_bytes:
                self._mapping = self._map()
                self._tensor = torch.from_numpy(self._touched(self._mapping))
                if register is not None:
                    undo.callback(register(self._tensor.data_ptr(), num_bytes))
        except BaseException:
            self._tensor = None
            undo.close()
            if self._mapping is not None:
                self._mapping.close()
            raise
        self.address = self._tensor.data_ptr() if num_bytes else 0
        # A region that is dropped without `close` must not stay page-locked or charged. Not at exit: there the process
        # gives everything back, and in a forked child the device must not be called.
        self._undo = weakref.finalize(self, undo.close)
        self._undo.atexit = False

    @property
    def tensor(self) -> Tensor:
        """All bytes of the region: torch.uint8, (num_bytes,)."""
        if self._tensor is None:
            raise InternalError(f"region of {self.owner!r} was used after it was closed.")
        return self._tensor

    def close(self) -> None:
        """Undo the page lock, unmap, discharge; a second call does nothing.

        Where views are still alive the memory cannot be unmapped under them: it stays mapped, no longer page-locked,
        until the last one dies, and InternalError says so. The ledger is discharged all the same, because nobody is
        left who could do it later: the region is closed and the views do not know the ledger.
        """
        if self._tensor is None:
            return
        self._tensor = None
        mapping, self._mapping = self._mapping, None
        try:
            self._undo()
        finally:
            if mapping is not None:
                self._unmap(mapping)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _map(self) -> mmap.mmap:
        try:
            mapping = map_anonymous(round_up(self.num_bytes, PAGE_BYTES))
        except (OSError, ValueError, OverflowError) as error:
            raise BudgetError(
                f"host memory: {self.owner!r} could not map {self.num_bytes} bytes ({format_bytes(self.num_bytes)}): "
                f"{error}. Lower host_memory, or raise the limit of this process or container."
            ) from error
        for name in _ADVICE:
            advice = getattr(mmap, name, None)
            if advice is not None:
                with contextlib.suppress(OSError):  # a kernel built without it: slower or larger, never wrong
                    mapping.madvise(advice)
        return mapping

    def _touched(self, mapping: mmap.mmap) -> np.ndarray[Any, np.dtype[np.uint8]]:
        # numpy, not torch.frombuffer: numpy keeps the buffer exported, so that close() under a live view raises instead
        # of unmapping memory that a tensor still shows.
        array = np.frombuffer(mapping, np.uint8, count=self.num_bytes)
        array[::PAGE_BYTES] = 0  # numpy releases the GIL here
        return array

    def _unmap(self, mapping: mmap.mmap) -> None:
        try:
            mapping.close()
        except BufferError as error:
            raise InternalError(
                f"region of {self.owner!r} ({self.num_bytes} bytes) was closed while views of it are alive; the memory "
                "stays mapped until the last of them dies. Drop every buffer and tensor of a region before closing it."
            ) from error


def typed(bytes_u8: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as elements of `dtype`, without a copy. Start and length must be multiples of its size."""
    if bytes_u8.dtype != torch.uint8 or bytes_u8.dim() != 1 or not bytes_u8.is_contiguous():
        raise InternalError(
            f"typed() takes contiguous bytes of one dimension, got {bytes_u8.dtype} of shape {tuple(bytes_u8.shape)}."
        )
    if bytes_u8.numel() % dtype.itemsize or bytes_u8.storage_offset() % dtype.itemsize:
        raise InternalError(
            f"{bytes_u8.numel()} bytes at storage offset {bytes_u8.storage_offset()} cannot be seen as {dtype}: both "
            f"must be multiples of {dtype.itemsize}."
        )
    return bytes_u8.view(dtype)


def bits(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The same memory as a numpy array for kernels, without a copy: bf16 and fp16 become uint16, the rest stay.

    The array keeps the memory alive.
    """
    seen_as = _VIEWED_AS.get(tensor.dtype)
    if seen_as is None or tensor.device.type != "cpu":
        raise InternalError(f"no kernel takes a tensor of {tensor.dtype} on {tensor.device}; move or cast it first.")
    return tensor.detach().view(seen_as).numpy()
