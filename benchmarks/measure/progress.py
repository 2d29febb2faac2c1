"""Live progress of a benchmark.

Owns: how runs and rounds are shown while they go on: a bar on a terminal with rich installed, else a line for each
round.
Does not: measure anything (rounds.py does).
Threads: the main thread.
"""

from types import TracebackType
from typing import Any, Protocol, Self

from offload.report.console import Console
from offload.report.progress import rich_console, rich_progress


class RoundProgress(Protocol):
    """Shows one run after the other; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def ran(self, words: str, seconds: float) -> None:
        """One more run is done."""


def make_round_progress(console: Console, warm_up_rounds: int, rounds: int, runs_per_round: int) -> RoundProgress:
    """A bar where somebody watches and rich is installed, else lines."""
    if console.is_terminal and rich_progress is not None:
        return BarRounds(console, (warm_up_rounds + rounds) * runs_per_round)
    return LineRounds(console, warm_up_rounds, rounds, runs_per_round)


class LineRounds:
    """One line for each round."""

    def __init__(self, console: Console, warm_up_rounds: int, rounds: int, runs_per_round: int) -> None:
        self._console = console
        self._warm_up_rounds = warm_up_rounds
        self._rounds = rounds
        self._runs_per_round = runs_per_round
        self._num_runs = 0
        self._round_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def ran(self, words: str, seconds: float) -> None:
        self._num_runs += 1
        self._round_s += seconds
        if self._num_runs % self._runs_per_round:
            return
        number = self._num_runs // self._runs_per_round
        in_warm_up = number <= self._warm_up_rounds
        name = f"warm-up {number}/{self._warm_up_rounds}"
        if not in_warm_up:
            name = f"round {number - self._warm_up_rounds:>{len(str(self._rounds))}}/{self._rounds}"
        self._console.line(f"{name}  {self._runs_per_round} contenders in {self._round_s:.2f} s")
        self._round_s = 0.0


class BarRounds:
    """A bar that redraws itself, by rich."""

    def __init__(self, console: Console, num_runs: int) -> None:
        if rich_progress is None or rich_console is None:
            raise ImportError("a progress bar needs rich; install offload-runtime[report].")
        self._bar: Any = rich_progress.Progress(
            rich_progress.TextColumn("run {task.completed}/{task.total}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("{task.fields[words]}"),
            rich_progress.TimeRemainingColumn(),
            console=rich_console.Console(file=console.stream),
            transient=True,
        )
        self._task = self._bar.add_task("bench", total=num_runs, words="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def ran(self, words: str, seconds: float) -> None:
        self._bar.update(self._task, advance=1, words=f"{words}: {seconds * 1000:.1f} ms")
