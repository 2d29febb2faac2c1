"""Lines, tables and progress as they reach a stream."""

import io
import signal

import pytest

from offload.cli.interrupt import StopRequest
from offload.report.console import Console, format_table
from offload.report.progress import MAX_PLAIN_LINES, BarProgress, make_progress


def test_a_table_is_aligned() -> None:
    table = format_table(["tier", "peak"], [["device", "1 B"], ["host", "1234 B"]])
    assert table.splitlines() == [
        "tier      peak",
        "--------------",
        "device     1 B",
        "host    1234 B",
    ]


@pytest.mark.parametrize("num_steps", [1, 5, 100, 1000])
def test_a_log_shows_the_first_and_the_last_step_and_is_never_long(num_steps: int) -> None:
    stream = io.StringIO()
    with make_progress(Console(stream), num_steps) as progress:
        for _ in range(num_steps):
            progress.step(loss=1.0, tokens_per_s=10.0)
    lines = stream.getvalue().splitlines()
    assert f" 1/{num_steps} " in lines[0]
    assert f" {num_steps}/{num_steps} " in lines[-1]
    assert len(lines) <= MAX_PLAIN_LINES + 2


def test_a_log_has_at_most_a_line_a_second_or_one_for_every_nth_step() -> None:
    shown = {}
    for log_every in (None, 1, 4):
        stream = io.StringIO()
        with make_progress(Console(stream), 10, log_every=log_every) as progress:
            for _ in range(10):
                progress.step(loss=1.0, tokens_per_s=10.0)
        shown[log_every] = [int(line.split()[1].partition("/")[0]) for line in stream.getvalue().splitlines()]
    assert shown == {None: [1, 10], 1: list(range(1, 11)), 4: [1, 4, 8, 10]}


class Terminal(io.StringIO):
    """A stream that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_bar_shows_the_latest_step_and_notes() -> None:
    stream = Terminal()
    progress = make_progress(Console(stream), 3)
    assert isinstance(progress, BarProgress)
    with progress:
        progress.step(loss=5.5, tokens_per_s=1000.0)
        progress.note("ending after this step")
        progress.step(loss=4.25, tokens_per_s=2000.0)
    shown = stream.getvalue()
    assert "step 2/3" in shown
    assert "loss 4.2500" in shown
    assert "ending after this step" in shown


def test_the_first_ctrl_c_is_remembered_and_the_second_raises() -> None:
    notes: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(lambda: notes.append("stopping")) as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        assert notes == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
