"""Checkpoints of `offload train`: its options, when to save, and going on from the newest.

Owns: that, and what a run's checkpoint holds besides the session: where in the text it is.
Does not: save or load (Session.save, Session.load).
Threads: the main thread.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import offload
from offload.checkpoint.format.folder import complete
from offload.cli.text import Windows
from offload.errors import ConfigError


def add_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Add them; `count` converts a number of at least 1."""
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="save there at the end, and where Ctrl-C ends the run")
    add("--checkpoint-every", type=count, metavar="N", help="save after every N-th step, too")
    add("--keep", type=count, metavar="N", help="how many checkpoints stay (default: all)")
    add("--resume", action="store_true", help="go on from the newest checkpoint, where there is one")


class Checkpoints:
    """Of one run; does nothing where none were asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._folder: Path | None = options.checkpoint
        self._every: int | None = options.checkpoint_every
        self._keep: int | None = options.keep
        self._resume: bool = options.resume
        self.steps = range(options.steps)
        """Those that are to be taken."""
        given = {"--checkpoint-every": self._every, "--keep": self._keep, "--resume": self._resume}
        if self._folder is None and any(given.values()):
            option = next(name for name, value in given.items() if value)
            raise ConfigError(f"{option} needs --checkpoint DIR, the folder of the checkpoints.")

    def resume(self, session: offload.Session, windows: Windows) -> None:
        """Go on from the newest checkpoint, if that was asked for and one is there."""
        if self._folder is None or not self._resume or not complete(self._folder):
            return
        loaded = session.load(self._folder)
        if loaded.step >= self.steps.stop:
            raise ConfigError(
                f"the newest checkpoint in {self._folder} has {loaded.step} steps, and --steps is {self.steps.stop}; "
                "give more steps, or another --checkpoint."
            )
        windows.state = loaded.extra["windows"]
        self.steps = range(loaded.step, self.steps.stop)

    def after_step(self, session: offload.Session, windows: Windows, number: int, *, is_ending: bool) -> None:
        """Save where it is time: after step `number`, counted from 0."""
        step = number + 1
        is_due = is_ending or step == self.steps.stop or (self._every is not None and step % self._every == 0)
        if self._folder is not None and is_due:
            session.save(self._folder, step=step, extra={"windows": windows.state}, keep=self._keep)
