"""Threads that run kernels.

Owns: the threads, and how a range is cut for them: at borders that never depend on their number.
Does not: know the kernels. They release the GIL, so plain threads scale.
Threads: `run` may be called by one thread at a time.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType
from typing import Final, Self

CHUNK_NUMEL: Final = 8 * 65_536
"""Elements a thread takes at once: 15 MiB of traffic, enough to make the cost of handing it over vanish."""


class Workers:
    """A fixed number of threads for kernels."""

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._executor = ThreadPoolExecutor(num_threads, "offload-kernel") if num_threads > 1 else None

    def run(self, work: Callable[[int, int], None], start: int, stop: int) -> None:
        """`work(a, b)` over [start, stop), cut at multiples of CHUNK_NUMEL; returns when all is done."""
        borders = [start, *range((start // CHUNK_NUMEL + 1) * CHUNK_NUMEL, stop, CHUNK_NUMEL), stop]
        chunks = [(a, b) for a, b in pairwise(borders) if a < b]
        if self._executor is None or len(chunks) == 1:
            for a, b in chunks:
                work(a, b)
            return
        futures = [self._executor.submit(work, a, b) for a, b in chunks]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """End the threads."""
        if self._executor is not None:
            self._executor.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
