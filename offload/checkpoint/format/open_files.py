"""The files of one folder, open for reading, a few at a time.

Owns: how many are open, and the refusal of a file that changed since it was first opened.
Does not: read (tensor_file.py).
Threads: one.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Final

from offload.checkpoint.format.errors import CorruptCheckpointError
from offload.checkpoint.format.tensor_file import FileIn

MAX_OPEN: Final = 16
"""Files open at once; a large checkpoint has more files than a process may open."""


class OpenFiles:
    """Files by name. `close` when done."""

    def __init__(self, folder: Path, *, follow_links: bool = False) -> None:
        self._folder = folder
        self._follow_links = follow_links
        self._open: OrderedDict[str, FileIn] = OrderedDict()
        self._identities: dict[str, tuple[int, ...]] = {}

    def get(self, name: str) -> FileIn:
        """The file, opened where it is not; valid until the next `get`."""
        opened = self._open.pop(name, None)
        if opened is None:
            while len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            opened = FileIn(self._folder / name, follow_links=self._follow_links)
        self._open[name] = opened
        now = opened.identity_now()  # also where it was open: it may have been rewritten since it was verified
        if self._identities.setdefault(name, now) != now:
            raise CorruptCheckpointError(f"{opened.path} was changed while it was being read; load again.")
        return opened

    def close(self) -> None:
        """Close all. Idempotent."""
        while self._open:
            self._open.popitem()[1].close()
