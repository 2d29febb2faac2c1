"""Bytes to train on: any file or folder, read a window at a time.

Owns: which files make up a text, in which order, and the random windows of a run.
Does not: keep text in memory. Each window is read when it is asked for, so a folder of any size costs its list of
files alone.
Threads: one thread.
"""

import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from offload.errors import ConfigError
from offload.planning.hardware import free_host_bytes

PEEK_BYTES: Final = 4096
"""How much of a file is looked at to tell text from the rest: text has no byte 0."""

TOKEN_BYTES: Final = 8
"""Of a byte as an index into the embedding."""


class Text:
    """Files one after the other, as one run of bytes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        sized = [(path, path.stat().st_size) for path in paths]
        self._paths = [path for path, num_bytes in sized if num_bytes]
        self._ends = list(accumulate(num_bytes for _, num_bytes in sized if num_bytes))

    @property
    def num_bytes(self) -> int:
        """Length of the whole text."""
        return self._ends[-1] if self._ends else 0

    @property
    def num_files(self) -> int:
        """Number of files that have bytes in them."""
        return len(self._paths)

    def read(self, start: int, num_bytes: int) -> bytes:
        """`num_bytes` from `start`, across the borders of files. Raises ConfigError where a file has shrunk."""
        parts = []
        index = bisect_right(self._ends, start)
        while num_bytes > 0:
            file_start = self._ends[index - 1] if index else 0
            wanted = min(num_bytes, self._ends[index] - start)
            parts.append(_read_exactly(self._paths[index], start - file_start, wanted))
            start, num_bytes, index = start + wanted, num_bytes - wanted, index + 1
        return b"".join(parts)


class Windows:
    """Random windows of a text, the same for the same seed."""

    def __init__(self, text: Text, *, batch: int, seq: int, seed: int) -> None:
        if text.num_bytes < seq + 1:
            raise ConfigError(
                f"the text has {text.num_bytes} bytes, one window of --seq {seq} needs {seq + 1}; "
                "give a longer text or a smaller --seq."
            )
        if batch * (seq + 1) * TOKEN_BYTES > free_host_bytes():
            raise ConfigError(
                f"--batch {batch} x --seq {seq} tokens do not fit the memory of this machine; lower one of them."
            )
        self._text = text
        self._shape = (batch, seq + 1)
        self._rng = np.random.default_rng(seed)

    @property
    def state(self) -> dict[str, Any]:
        """What the next windows depend on, for a checkpoint."""
        return dict(self._rng.bit_generator.state)

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._rng.bit_generator.state = state

    @property
    def num_tokens(self) -> int:
        """Predicted from each draw."""
        batch, length = self._shape
        return batch * (length - 1)

    def draw(self) -> npt.NDArray[np.uint8]:
        """The next (batch, seq + 1) bytes: inputs are all but the last of a row, targets all but the first."""
        batch, length = self._shape
        starts = self._rng.integers(0, self._text.num_bytes - length, size=batch, endpoint=True)
        rows = bytearray().join(self._text.read(int(start), length) for start in starts)  # writable: torch asks for it
        return np.frombuffer(rows, dtype=np.uint8).reshape(self._shape)


def open_text(path: Path | None) -> Text:
    """The text of a file, of a folder's text files, or (None) of the source of Python's standard library.

    Files come in the order of their paths. In a folder, hidden files and files that hold a byte 0 are left out.
    """
    if path is None:
        return Text(_standard_library())
    if path.is_file():
        text = Text([path])
    elif path.is_dir():
        text = Text([file for file in sorted(path.rglob("*")) if _is_visible(file, path) and _is_text(file)])
    else:
        raise ConfigError(f"--text {path} is neither a file nor a folder; give one that exists.")
    if text.num_bytes == 0:
        raise ConfigError(f"--text {path} holds no text; give a file or folder with bytes in it.")
    return text


def _standard_library() -> list[Path]:
    """The modules of the running Python. What else is installed differs from one machine to the next."""
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    files = [file for file in sorted(root.rglob("*.py")) if not installed & set(file.relative_to(root).parts)]
    if not files:
        raise ConfigError(f"the standard library at {root} has no source files; name a text with --text.")
    return files


def _is_visible(file: Path, root: Path) -> bool:
    return file.is_file() and not any(part.startswith(".") for part in file.relative_to(root).parts)


def _is_text(file: Path) -> bool:
    with file.open("rb") as stream:
        return b"\0" not in stream.read(PEEK_BYTES)


def _read_exactly(path: Path, offset: int, num_bytes: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        found = stream.read(num_bytes)
    if len(found) != num_bytes:
        raise ConfigError(
            f"{path}: wanted {num_bytes} bytes at {offset}, got {len(found)}. It changed while it was trained on; "
            "copy the text somewhere else and start again."
        )
    return found
