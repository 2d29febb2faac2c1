"""Every setting on an accelerator that is not there: the bits of the serial run, and no two accesses without an event.

Each combination of two settings is tried in some run; all combinations under OFFLOAD_STRESS=1.
"""

import itertools
import os
from pathlib import Path

import pytest

from tests.stress.cases import Case, Operation
from tests.stress.program import run, serial

KINDS = ("linear", "half frozen", "twice", "residual")

Settings = tuple[str, ...]

SETTINGS = {
    "home": ("device", "host", "disk"),
    "device": ("stream", "host"),
    "rings": ("smallest", "more"),
    "overlap": ("forward", "backward", "off"),
    "rounds": ("1 round", "2 rounds"),
    "clipping": ("clipped", "not clipped"),
    "checkpoints": ("whole", "non-reentrant", "reentrant"),
    "precision": ("fp32", "bf16"),
}


def is_possible(settings: Settings) -> bool:
    """Steps inside backward go without clipping and without reentrant checkpoints."""
    return "backward" not in settings or not {"clipped", "reentrant"} & set(settings)


def pairs_of(settings: Settings) -> set[tuple[str, str]]:
    return set(itertools.combinations(settings, 2))


def some_of(every: list[Settings]) -> list[Settings]:
    """So few that each pair of values that is possible at all is in one of them: the one with most new pairs first."""
    chosen: list[Settings] = []
    missing = set().union(*(pairs_of(settings) for settings in every))
    while missing:
        best = max(every, key=lambda settings: len(pairs_of(settings) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


EVERY = [settings for settings in itertools.product(*SETTINGS.values()) if is_possible(settings)]


def case_of(settings: Settings) -> Case:
    home, device, rings, overlap, rounds, clipping, checkpoints, precision = settings
    num_rounds = int(rounds[0])
    way = {"whole": "run", "non-reentrant": "checkpoint", "reentrant": "reentrant"}[checkpoints]
    operations: list[Operation] = []
    for step in range(3):
        operations += [("train", (10 * step + number, (way,) * len(KINDS))) for number in range(num_rounds)]
        operations += [("step", None), ("zero_grad", True)]
    return Case(
        seed=1,
        operations=tuple(operations),
        kinds=KINDS,
        num_groups=2,
        precision=precision,
        max_grad_norm=0.5 if clipping == "clipped" else None,
        accumulate=num_rounds,
        overlap=overlap,
        order="checked",
        device=device,
        device_share=1.0 if home == "device" else 0.0,
        host_share=0.0 if home == "disk" else 1.0,
        smallest_rings=rings == "smallest",
        buffers=0 if rings == "smallest" else 2,
        slots=1.0 if rings == "smallest" else 2.0,
    )


@pytest.mark.parametrize("settings", EVERY if os.environ.get("OFFLOAD_STRESS") else some_of(EVERY), ids=", ".join)
def test_these_settings_give_the_serial_bits_and_every_conflict_is_ordered_by_an_event(
    settings: Settings, tmp_path: Path
) -> None:
    case = case_of(settings)
    assert run(case, tmp_path).difference(serial(case, tmp_path)) == ""
    assert list(tmp_path.iterdir()) == []
