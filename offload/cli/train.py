"""`offload train`: a byte-level GPT on any text, within byte budgets; under torchrun on several ranks.

Owns: the training loop, the table at the end and the JSON of a run.
Does not: offload anything. The loop is the one any user would write, around `offload.enable`.
Threads: the main thread.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

import offload
from offload.cli.checkpoints import Checkpoints
from offload.cli.exit_codes import INTERRUPTED
from offload.cli.gpt import GPT, GPTConfig, config_for
from offload.cli.interrupt import StopRequest
from offload.cli.rank import Rank, rank_of_this_process, remove_what_killed_ranks_left
from offload.cli.rss import measure_baseline_rss_bytes, peak_rss_bytes
from offload.cli.text import Text, Windows, open_text
from offload.cli.train_options import add_parser, max_grad_norm_of
from offload.disk.endurance import project_endurance
from offload.errors import ConfigError
from offload.report.console import Console, format_table
from offload.report.progress import Progress, make_progress
from offload.report.results import STANDARD_OUTPUT, check_result_path, write_result
from offload.units import Tier, format_bytes

WEIGHT_DECAY: Final = 0.1
BETAS: Final = (0.9, 0.95)

METRICS: Final = ("peak_bytes", "homes", "bytes_moved", "wait_s", "unplanned_fetches", "disk_mode")
"""What the JSON takes from the session as it is."""


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `train` to the command line."""
    add_parser(commands).set_defaults(run=run)


# --------------------------------------------------------------------------------------------------------- run


@dataclass
class Run:
    """What one run has done so far."""

    tokens_per_step: int
    losses: list[float] = field(default_factory=list)
    """One a step, of the forward before its update."""
    ends_s: list[float] = field(default_factory=list)
    """When each step ended; the first entry is when the loop began."""
    ended_by: signal.Signals | None = None
    """What this process got before the last step."""

    def tokens_per_s(self) -> float:
        """Speed over all steps but the first, which warms up; over that one where there are no more."""
        first = 1 if len(self.ends_s) > 2 else 0
        passed_s = self.ends_s[-1] - self.ends_s[first]
        return self.tokens_per_step * (len(self.ends_s) - 1 - first) / passed_s if passed_s else 0.0


def run(options: argparse.Namespace) -> int:
    """Carry out `offload train`; returns the exit code."""
    options.max_grad_norm = max_grad_norm_of(options)
    remove_what_killed_ranks_left(options.disk or ())
    with rank_of_this_process() as rank, Path(os.devnull).open("w") as nowhere:
        stream = sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout
        return _run(options, rank, Console(stream if rank.is_first else nowhere))


def _run(options: argparse.Namespace, rank: Rank, console: Console) -> int:
    rank.check_batch(options.batch)
    _check_paths(options.json, options.disk or ())
    saves = Checkpoints(options, console)
    config = config_for(options.params, seq=options.seq)
    text = open_text(options.text)
    windows = Windows(text, batch=options.batch, seq=options.seq, seed=options.seed)
    baseline_rss_bytes = measure_baseline_rss_bytes(options.precision) if options.json and rank.is_first else None
    console.line(_describe(config, text, options))

    torch.manual_seed(options.seed)
    with offload.deferred_init():
        model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    session = offload.enable(
        model,
        optimizer,
        device=rank.device,
        device_memory=options.device_memory,
        host_memory=options.host_memory,
        disk=options.disk,
        precision=options.precision,
        state_dtype=options.state_dtype,
        max_grad_norm=options.max_grad_norm,
        accumulate=1,
        overlap=options.overlap,
        checksum=options.checksum,
        wait_timeout_s=options.wait_timeout,
    )
    try:
        saves.resume(session, windows)
        if saves.steps.start:
            console.line(f"going on after step {saves.steps.start} of {options.steps}")
        with make_progress(console, len(saves.steps), log_every=options.log_every) as progress:
            done, interrupted = train(model, optimizer, session, windows, rank, progress, saves)
        metrics = session.metrics()
        weights_sha256 = session.weights_sha256() if options.json else None
    finally:
        # The trained weights are dropped: returning them would need memory for the whole model.
        session.close(give_back=False)

    console.line()
    console.line(format_summary(done, metrics))
    if options.disk:
        elapsed_s = done.ends_s[-1] - done.ends_s[0]
        wear = project_endurance(metrics["bytes_moved"]["write"], elapsed_s, rated_tbw=options.rated_tbw)
        console.line(f"\n{'warning: ' if wear.is_alarming else ''}{wear.text}")
    if options.json and rank.is_first:
        measured = {
            "world_size": rank.world_size,
            "baseline_rss_bytes": baseline_rss_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "weights_sha256": weights_sha256,
        }
        write_result(options.json, make_result(config, done, metrics, options) | measured)
    if done.ended_by is not None and done.ended_by is not signal.SIGINT:
        signal.raise_signal(done.ended_by)  # whoever sent it sees the status of a process that it ended
    return INTERRUPTED if interrupted else 0


def train(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    session: offload.Session,
    windows: Windows,
    rank: Rank,
    progress: Progress,
    saves: Checkpoints,
) -> tuple[Run, bool]:
    """The loop. Returns what was done, and whether a signal to any rank ended it before its last step."""
    done = Run(tokens_per_step=windows.num_tokens, ends_s=[time.perf_counter()])
    is_ending = False
    announce = "ending after this step (once more ends at once)"
    signals = (signal.SIGINT, signal.SIGTERM) if saves.is_asked_for else (signal.SIGINT,)
    with StopRequest(lambda: progress.note(announce), signals) as stop:
        for number in saves.steps:
            window = torch.from_numpy(rank.part_of(windows.draw())).long()
            loss = model(window[:, :-1], window[:, 1:])
            session.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            whole_loss, is_ending = rank.agree(loss.item(), is_ending=stop.requested)
            done.losses.append(whole_loss)
            done.ends_s.append(time.perf_counter())
            progress.step(done.losses[-1], done.tokens_per_step / (done.ends_s[-1] - done.ends_s[-2]))
            saves.after_step(session, windows, number, is_ending=is_ending)
            if is_ending:
                break
    done.ended_by = stop.signal
    return done, is_ending


# ------------------------------------------------------------------------------------------------------ results


def make_result(config: GPTConfig, done: Run, metrics: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The JSON of a run, but for what is measured of the process and the weights."""
    given = {Tier.DEVICE: options.device_memory, Tier.HOST: options.host_memory, Tier.DISK: None}
    return {
        "params": config.num_parameters,
        "losses": done.losses,
        "seconds_per_step": [stop - start for start, stop in pairwise(done.ends_s)],
        "tokens_per_s": done.tokens_per_s(),
        "budget_bytes": {str(tier): num_bytes for tier, num_bytes in given.items()},  # null: none was given
        **{key: metrics[key] for key in METRICS},
    }


def format_summary(done: Run, metrics: dict[str, Any]) -> str:
    """What a person wants to know at the end: how the loss fell, and what each tier held against its budget."""
    kinds = list(metrics["homes"])
    rows = []
    for tier in Tier:
        budget_bytes = metrics["budget_bytes"][tier]
        rows.append([
            str(tier),
            format_bytes(budget_bytes) if budget_bytes else "none",
            format_bytes(metrics["peak_bytes"][tier]),
            *(format_bytes(metrics["homes"][kind].get(tier, 0)) for kind in kinds),
        ])  # fmt: skip
    table = format_table(["tier", "budget", "peak", *(f"home of {kind}" for kind in kinds)], rows)
    if not done.losses:
        return table
    words = f"loss {done.losses[0]:.4f} -> {done.losses[-1]:.4f} in {len(done.losses)} steps"
    return f"{words}, {done.tokens_per_s():,.0f} tokens/s\n\n{table}"


def _describe(config: GPTConfig, text: Text, options: argparse.Namespace) -> str:
    return (
        f"{config.num_parameters:,} parameters ({config.depth} blocks of width {config.width}, {options.precision}), "
        f"{format_bytes(text.num_bytes)} of text in {text.num_files} files, "
        f"{options.batch} x {options.seq} bytes a step"
    )


def _check_paths(json_path: str | None, disks: Sequence[Path]) -> None:
    """A path that cannot be used is told before any work, the one for the result most of all."""
    check_result_path(json_path)
    for folder in disks:
        if not folder.is_dir():
            raise ConfigError(f"--disk {folder} is not a folder; make it (mkdir -p {folder}) or name one that exists.")
