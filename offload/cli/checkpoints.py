"""Checkpoints of `offload train`: its options, when to save, and going on from the newest.

Owns: that, and what a run's checkpoint holds besides the session: where in the text it is.
Does not: save or load (Session.save, Session.load).
Threads: the main thread.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import offload
from offload.checkpoint.format.folder import check_folder, holds_any
from offload.cli.numbers import at_least_one, path
from offload.cli.text import Windows
from offload.errors import ConfigError
from offload.report.console import Console

RESUMED: Final = {
    "batch": "is used from here on",
    "max_grad_norm": "is used from here on",
    "lr": "has no effect: the learning rate is the checkpoint's",
    "seed": "has no effect: the random states are the checkpoint's",
}
"""Options that decide what a run computes, and what another value does where one goes on from a checkpoint."""


def add_options(add: Callable[..., Any]) -> None:
    """Add them."""
    add(
        "--checkpoint", type=path, metavar="DIR", help="save there at the end, and where Ctrl-C or SIGTERM ends the run"
    )
    add("--checkpoint-every", type=at_least_one, metavar="N", help="save after every N-th step, too")
    add("--keep", type=at_least_one, metavar="N", help="how many checkpoints stay (default: all)")
    add("--resume", action="store_true", help="go on from the newest checkpoint that is whole, where there is one")


class Checkpoints:
    """Of one run; does nothing where none were asked for."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._folder: Path | None = options.checkpoint
        self._every: int | None = options.checkpoint_every
        self._keep: int | None = options.keep
        self._resume: bool = options.resume
        self._console = console
        self._options = {name: getattr(options, name) for name in RESUMED}
        self.steps = range(options.steps)
        """Those that are to be taken."""
        given = {"--checkpoint-every": self._every, "--keep": self._keep, "--resume": self._resume}
        if self._folder is None and any(given.values()):
            option = next(name for name, value in given.items() if value)
            raise ConfigError(f"{option} needs --checkpoint DIR, the folder of the checkpoints.")
        if self._folder is not None:
            check_folder(self._folder, name="--checkpoint")

    @property
    def is_asked_for(self) -> bool:
        """Whether anything is saved."""
        return self._folder is not None

    def resume(self, session: offload.Session, windows: Windows) -> None:
        """Go on from the newest checkpoint, if that was asked for and one is there."""
        if self._folder is None or not self._resume or not holds_any(self._folder):
            return
        loaded = session.load(self._folder, on_corrupt="previous")
        if loaded.step >= self.steps.stop:
            raise ConfigError(
                f"the newest checkpoint in {self._folder} has {loaded.step} steps, and --steps is {self.steps.stop}; "
                "give more steps, or another --checkpoint."
            )
        windows.state = loaded.extra["windows"]
        self.steps = range(loaded.step, self.steps.stop)
        for note in loaded.notes:
            self._console.line(f"note: {note}")
        self._warn(loaded.extra.get("options", {}))

    def _warn(self, saved: Mapping[str, Any]) -> None:
        """Tell once of options that the run had not."""
        told = [
            f"--{name.replace('_', '-')} {self._options[name]} {words} (it had {saved[name]})"
            for name, words in RESUMED.items()
            if name in saved and saved[name] != self._options[name]
        ]
        if told:
            self._console.line(f"warning: --resume goes on with a run of other options: {'; '.join(told)}.")

    def after_step(self, session: offload.Session, windows: Windows, number: int, *, is_ending: bool) -> None:
        """Save where it is time: after step `number`, counted from 0."""
        step = number + 1
        is_due = is_ending or step == self.steps.stop or (self._every is not None and step % self._every == 0)
        if self._folder is not None and is_due:
            extra = {"windows": windows.state, "options": self._options}
            session.save(self._folder, step=step, extra=extra, keep=self._keep)
