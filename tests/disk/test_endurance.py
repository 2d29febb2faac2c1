"""The projection of a disk's wear: its arithmetic, its words, and when it alarms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.disk.endurance import ALARMING_DAYS, ALARMING_SHARE, DAY_S, TB, project_endurance
from offload.errors import ConfigError


def test_a_day_at_one_gigabyte_a_second_on_a_common_disk_alarms() -> None:
    told = project_endurance(86_400 * 10**9, DAY_S, rated_tbw=600)
    assert told.is_alarming
    assert told.text == (
        "86.40 TB written to disk, 1.00 GB a second; so far 14.40 % of the 600 TB that the disk is rated for, which "
        "last 7 days at this rate. Raise host_memory so that less goes to disk, or use a disk made for writing"
    )


def test_a_light_run_on_a_strong_disk_does_not_alarm() -> None:
    told = project_endurance(10**9, 100.0, rated_tbw=10_000)
    assert not told.is_alarming
    assert told.text == (
        "1.00 GB written to disk, 10.00 MB a second; so far less than 0.01 % of the 10000 TB that the disk is rated "
        "for, which last 32 years at this rate"
    )


def test_the_whole_run_counts_where_its_length_is_known() -> None:
    """Scenario: after a minute little is written; in a year the run would have used up a tenth of the disk."""
    rate = 0.1 * 1000 * TB / (365 * DAY_S)
    in_backward = project_endurance(int(rate * 60), 60.0, rated_tbw=1000)
    assert not in_backward.is_alarming
    whole = project_endurance(int(rate * 60), 60.0, rated_tbw=1000, total_s=365 * DAY_S)
    assert whole.is_alarming
    assert "the whole run 10.00 % of the 1000 TB" in whole.text


def test_without_a_rating_the_bytes_are_told_and_how_to_name_one() -> None:
    told = project_endurance(3 * 10**12, 6000.0, rated_tbw=None)
    assert not told.is_alarming
    assert told.text == (
        "3.00 TB written to disk, 500.00 MB a second; --rated-tbw tells what that is of the disk's endurance"
    )


def test_a_run_that_wrote_nothing_or_took_no_time_is_told_too() -> None:
    assert project_endurance(0, 10.0, rated_tbw=600).text == (
        "0 B written to disk; so far 0.00 % of the 600 TB that the disk is rated for"
    )
    assert not project_endurance(500, 0.0, rated_tbw=600).is_alarming


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_a_rating_that_is_none_raises(wrong: float) -> None:
    with pytest.raises(ConfigError, match="data sheet"):
        project_endurance(1, 1.0, rated_tbw=wrong)


@given(
    written_bytes=st.integers(1, 10**16), elapsed_s=st.floats(1e-3, 1e8), rated_tbw=st.floats(0.1, 1e5),
    total_s=st.none() | st.floats(0, 1e9),
)  # fmt: skip
def test_it_alarms_exactly_where_the_disk_lasts_too_short_or_a_run_takes_too_much(
    written_bytes: int, elapsed_s: float, rated_tbw: float, total_s: float | None
) -> None:
    told = project_endurance(written_bytes, elapsed_s, rated_tbw=rated_tbw, total_s=total_s)
    rate = written_bytes / elapsed_s
    run_bytes = max(written_bytes, rate * (total_s or 0.0))
    short = rated_tbw * TB / rate / DAY_S < ALARMING_DAYS
    assert told.is_alarming == (short or run_bytes / (rated_tbw * TB) > ALARMING_SHARE)
    assert told.is_alarming == ("Raise host_memory" in told.text)
