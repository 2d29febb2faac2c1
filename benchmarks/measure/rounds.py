"""Benchmarks in interleaved rounds: each round runs every contender once, so that whatever else the machine does at
that time meets all of them.

Owns: the order of runs, warm-up, and the figures made of the samples.
Does not: know what is run, or show it (report/).
Threads: the main thread.

Note [Ratios]: two contenders are compared within each round, and the median of these ratios is reported. A ratio of two
medians would compare rounds of different load.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.measure.progress import RoundProgress

WARM_UP_ROUNDS: Final = 2
"""The first compiles and makes optimizers allocate their state; the second meets everything as the rest do."""

SETTLE_S: Final = 0.05
"""Pause before each run: OpenMP's threads go on spinning for some milliseconds after their work, and would take cores
from the next contender."""

Samples = Mapping[str, Sequence[float]]
"""Seconds of each round, by contender."""


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that is run once in each round."""

    name: str
    words: str
    """What people see."""
    run: Callable[[], float]
    """Does it once; returns the seconds that it took."""


@dataclass(frozen=True, slots=True)
class Quartiles:
    """The middle and the spread of one contender's samples."""

    lower: float
    median: float
    upper: float


def timed(work: Callable[[], None]) -> Callable[[], float]:
    """A contender's `run` for work that is done when it returns."""

    def run() -> float:
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s

    return run


def rotated(names: Sequence[str], round_number: int) -> list[str]:
    """The order of one round: each contender is first, second, … equally often."""
    first = round_number % len(names)
    return [*names[first:], *names[:first]]


def run_rounds(
    contenders: Sequence[Contender],
    rounds: int,
    progress: RoundProgress,
    *,
    warm_up_rounds: int = WARM_UP_ROUNDS,
    settle_s: float = SETTLE_S,
) -> dict[str, list[float]]:
    """Seconds of every round by contender, without the rounds of warm-up."""
    by_name = {contender.name: contender for contender in contenders}
    samples: dict[str, list[float]] = {name: [] for name in by_name}
    for number in range(-warm_up_rounds, rounds):
        for name in rotated(list(by_name), number + warm_up_rounds):
            time.sleep(settle_s)
            seconds = by_name[name].run()
            progress.ran(by_name[name].words, seconds)
            if number >= 0:
                samples[name].append(seconds)
    return samples


def quartiles_of(samples: Sequence[float]) -> Quartiles:
    """Median and quartiles; of one sample that sample three times."""
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Quartiles(lower, median, upper)


@dataclass(frozen=True, slots=True)
class Ratio:
    """See Note [Ratios]: how many times as quick as the quickest of `over` `under` is."""

    over: tuple[str, ...]
    under: str

    def terms(self, samples: Samples) -> tuple[str, str] | None:
        """The two that are compared; None where one did not run."""
        ran = [name for name in self.over if samples.get(name)]
        if not ran or not samples.get(self.under):
            return None
        return min(ran, key=lambda name: statistics.median(samples[name])), self.under

    def of_rounds(self, samples: Samples) -> list[float]:
        """One for each round; empty where one of the two did not run."""
        terms = self.terms(samples)
        if terms is None:
            return []
        over, under = terms
        return [a / b for a, b in zip(samples[over], samples[under], strict=True)]

    def median(self, samples: Samples) -> float | None:
        """Of the rounds; None where one of the two did not run."""
        ratios = self.of_rounds(samples)
        return statistics.median(ratios) if ratios else None
