"""Live progress of a training run.

Owns: how a step is shown while the run goes on: a bar on a terminal with rich installed, else plain lines.
Does not: measure anything (cli/train.py does).
Threads: the training thread.
"""

import time
from types import ModuleType, TracebackType
from typing import Any, Final, Protocol, Self

from offload.report.console import Console

rich_console: ModuleType | None
rich_progress: ModuleType | None
try:
    import rich.console as rich_console
    import rich.progress as rich_progress
except ImportError:  # the extra `report` is not installed
    rich_console = rich_progress = None

MAX_PLAIN_LINES: Final = 100
"""A log of a long run shows about this many lines, evenly spread over its steps."""

LINE_INTERVAL_S: Final = 1.0
"""Between two lines of steps, unless the user says how many steps."""


class Progress(Protocol):
    """Shows one step after the other; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def step(self, loss: float, tokens_per_s: float) -> None:
        """One more step is done."""

    def note(self, text: str) -> None:
        """Say something in between."""


def make_progress(console: Console, num_steps: int, *, log_every: int | None = None) -> Progress:
    """A bar where somebody watches and rich is installed, else lines; a line every `log_every` steps where given."""
    if console.is_terminal and rich_progress is not None and log_every is None:
        return BarProgress(console, num_steps)
    return LineProgress(console, num_steps, log_every)


class LineProgress:
    """A line for the first step, the last, and some between them: at most one a second, or every n-th step."""

    def __init__(self, console: Console, num_steps: int, log_every: int | None) -> None:
        self._console = console
        self._num_steps = num_steps
        self._every = max(1, round(num_steps / MAX_PLAIN_LINES)) if log_every is None else log_every
        self._interval_s = LINE_INTERVAL_S if log_every is None else 0.0
        self._next_s = 0.0
        """When the next line may come."""
        self._num_done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def step(self, loss: float, tokens_per_s: float) -> None:
        self._num_done += 1
        is_due = self._num_done % self._every == 0 and time.monotonic() >= self._next_s
        if self._num_done in (1, self._num_steps) or is_due:
            self._next_s = time.monotonic() + self._interval_s
            digits = len(str(self._num_steps))
            self._console.line(
                f"step {self._num_done:>{digits}}/{self._num_steps}  loss {loss:7.4f}  {tokens_per_s:9,.0f} tokens/s"
            )

    def note(self, text: str) -> None:
        self._console.line(text)


class BarProgress:
    """A bar that redraws itself, by rich."""

    def __init__(self, console: Console, num_steps: int) -> None:
        if rich_progress is None or rich_console is None:
            raise ImportError("a progress bar needs rich; install offload-runtime[report].")
        self._bar: Any = rich_progress.Progress(
            rich_progress.TextColumn("step {task.completed}/{task.total}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("loss {task.fields[loss]:.4f}  {task.fields[tokens_per_s]:,.0f} tokens/s"),
            rich_progress.TimeRemainingColumn(),
            console=rich_console.Console(file=console.stream),
        )
        self._task = self._bar.add_task("train", total=num_steps, loss=float("nan"), tokens_per_s=0.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, loss: float, tokens_per_s: float) -> None:
        self._bar.update(self._task, advance=1, loss=loss, tokens_per_s=tokens_per_s)

    def note(self, text: str) -> None:
        self._bar.console.print(text)
