"""Progress of interleaved rounds."""

import io

from benchmarks.measure.progress import BarRounds, LineRounds, make_round_progress
from offload.report.console import Console


class Terminal(io.StringIO):
    """A stream that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_a_log_has_one_line_for_each_round() -> None:
    stream = io.StringIO()
    progress = make_round_progress(Console(stream), warm_up_rounds=1, rounds=2, runs_per_round=2)
    assert isinstance(progress, LineRounds)
    with progress:
        for seconds in (1.0, 2.0, 0.25, 0.5, 0.125, 0.25):
            progress.ran("copy", seconds)
    assert stream.getvalue().splitlines() == [
        "warm-up 1/1  2 contenders in 3.00 s",
        "round 1/2  2 contenders in 0.75 s",
        "round 2/2  2 contenders in 0.38 s",
    ]


def test_on_a_terminal_a_bar_shows_the_latest_run() -> None:
    stream = Terminal()
    progress = make_round_progress(Console(stream), warm_up_rounds=0, rounds=1, runs_per_round=2)
    assert isinstance(progress, BarRounds)
    with progress:
        progress.ran("copy", 0.5)
    assert "run 1/2" in stream.getvalue()
    assert "copy: 500.0 ms" in stream.getvalue()
