"""Page-locking of host memory for copies to and from an accelerator.

Owns: the parts that one range is locked in, the codes that the runtime returns, and the addresses no copy may cross.
Does not: know a runtime (accelerator.py passes it in), or map memory (memory/region.py).
Threads: memory is locked and unlocked by the thread that makes and closes regions; `cut` is called by any lane.
"""

import bisect
import contextlib
import itertools
import logging
from collections.abc import Callable
from typing import Any, Final

from offload.errors import ConfigError
from offload.units import GIB, format_bytes

log = logging.getLogger("offload")

REGISTRATION_BYTES: Final = 64 * GIB
"""Page-locked by one call; drivers were seen to refuse 512 GiB and more."""


class Borders:
    """Addresses at which one registration of host memory ends and the next begins: no copy may cross one."""

    def __init__(self) -> None:
        self._addresses: list[int] = []

    def add(self, address: int) -> None:
        """Copies end here from now on."""
        bisect.insort(self._addresses, address)

    def remove(self, address: int) -> None:
        """The opposite."""
        self._addresses.remove(address)

    def cut(self, address: int, num_bytes: int) -> list[tuple[int, int]]:
        """The ranges of a copy from or to `address`, relative to it."""
        first = bisect.bisect_right(self._addresses, address)
        last = bisect.bisect_left(self._addresses, address + num_bytes)
        offsets = [0, *(border - address for border in self._addresses[first:last]), num_bytes]
        return list(itertools.pairwise(offsets))


class HostRegistration:
    """Page-locks host memory, in parts; undoes it."""

    def __init__(self, runtime: Any, borders: Borders, *, part_bytes: int = REGISTRATION_BYTES) -> None:
        self._runtime = runtime
        """`cudaHostRegister`, `cudaHostUnregister`, `cudaGetErrorString`, as torch.cuda.cudart() has them."""
        self._borders = borders
        self._part_bytes = part_bytes

    def lock(self, address: int, num_bytes: int, forget_error: Callable[[], None]) -> Callable[[], None]:
        """Exactly these bytes; returns what undoes it. Nothing stays locked where a part cannot be."""
        undo = contextlib.ExitStack()
        for start in range(address, address + num_bytes, self._part_bytes):
            length = min(self._part_bytes, address + num_bytes - start)
            code = int(self._runtime.cudaHostRegister(start, length, 0))
            if code != 0:
                undo.close()
                forget_error()
                raise ConfigError(
                    f"page-locking {format_bytes(num_bytes)} of host memory failed with CUDA error {code} "
                    f"({self._words(code)}); lower host_memory, or raise the limit on locked memory (ulimit -l) of "
                    "this process or container."
                )
            undo.callback(self._unlock, start)
            if start != address:
                self._borders.add(start)
                undo.callback(self._borders.remove, start)
        return undo.close

    def _unlock(self, start: int) -> None:
        code = int(self._runtime.cudaHostUnregister(start))
        if code != 0:  # no reason to fail: whoever lost the device has an error of its own
            log.warning("host memory could not be unlocked: CUDA error %d (%s)", code, self._words(code))

    def _words(self, code: int) -> str:
        try:
            return str(self._runtime.cudaGetErrorString(self._runtime.cudaError(code)))
        except (AttributeError, TypeError, ValueError, RuntimeError):  # words are a courtesy
            return "see the CUDA runtime's list of errors"
