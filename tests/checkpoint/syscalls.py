"""The calls that a save makes to the system: recorded, made to fail, or cut off as by SIGKILL.

The functions of `os` are replaced for one block, so the code under test is what runs in production, `shutil` and
`pathlib` included.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CHANGING = (
    "open", "write", "pwrite", "posix_fallocate", "fsync", "fdatasync", "rename", "replace", "mkdir", "unlink", "rmdir",
    "close",
)  # fmt: skip
TAKING_ROOM = frozenset({"open", "write", "pwrite", "posix_fallocate", "fsync", "fdatasync", "mkdir", "rename"})


class Killed(BaseException):
    """Stands for the end of the process: from here on no call reaches the system."""


@dataclass
class Call:
    """One call, with the files that it names."""

    name: str
    paths: tuple[str, ...]


@dataclass
class Syscalls:
    """What happens at the calls of a block. Counted are those that name a file below `root`."""

    root: Path
    kill_at: int = -1
    """The call that never happens, nor does any after it; half of what a write has is written."""
    full_at: int = -1
    """The call at which the disk is found full."""
    calls: list[Call] = field(default_factory=list)
    hit: str = ""
    """Name of the call that was cut off or failed."""
    _names: dict[int, str] = field(default_factory=dict)
    _real: dict[str, Callable[..., object]] = field(default_factory=dict)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        try:
            with pytest.MonkeyPatch.context() as patch:
                for name in CHANGING:
                    self._real[name] = getattr(os, name)
                    patch.setattr(os, name, self._wrapped(name))
                yield
        finally:
            for descriptor in self._names:  # as the system does for a killed process
                os.close(descriptor)

    def _wrapped(self, name: str) -> Callable[..., object]:
        real = self._real[name]

        def call(*args: object, **kwargs: object) -> object:
            paths = self._paths(args, kwargs)
            if not any(path.startswith(str(self.root)) for path in paths):
                return real(*args, **kwargs)
            if self.hit and self.kill_at >= 0:
                raise Killed
            number = len(self.calls)
            self.calls.append(Call(name, paths))
            if number == self.kill_at:
                self.hit = name
                if name in ("write", "pwrite"):
                    data = memoryview(args[1])
                    real(args[0], data[: data.nbytes // 2], *args[2:])
                raise Killed
            if number == self.full_at and name in TAKING_ROOM:
                self.hit = name
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), paths[0])
            result = real(*args, **kwargs)
            if name == "open":
                self._names[result] = paths[0]
            elif name == "close":
                self._names.pop(args[0], None)
            return result

        return call

    def _paths(self, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[str, ...]:
        folder = self._names.get(kwargs.get("dir_fd"), "")
        names = []
        for arg in args[:2]:
            if isinstance(arg, int):
                names.append(self._names.get(arg, ""))
            elif isinstance(arg, str | os.PathLike):
                names.append(os.path.join(folder, os.fspath(arg)))  # noqa: PTH118 - what os.open got
        return tuple(filter(None, names))
