"""Lines and tables on a stream.

Owns: writing to a terminal or file, the layout of tables.
Does not: decide what is said (cli/).
Threads: one thread for each console.
"""

from collections.abc import Sequence
from typing import TextIO


class Console:
    """Writes whole lines, at once visible."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def line(self, text: str = "") -> None:
        """Write one line, or several separated by newlines."""
        self.stream.write(f"{text}\n")
        self.stream.flush()

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches: bars that redraw themselves make sense."""
        return self.stream.isatty()


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right, a rule below the header."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def one_line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])

    return "\n".join([one_line(header), "-" * len(one_line(header)), *(one_line(row) for row in rows)])
