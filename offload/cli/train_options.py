"""The options of `offload train`: their forms, their defaults, and the words of its help.

Owns: that; every value that can be known to be unusable is refused here, or by what the value is given to, before any
work.
Does not: train (train.py).
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, Final

from offload.cli import checkpoints
from offload.cli.gpt import parse_count
from offload.cli.numbers import (
    at_least_one,
    byte_count,
    checked,
    dtype_name,
    learning_rate,
    norm,
    path,
    seed,
    terabytes,
    wait_seconds,
)
from offload.config import OVERLAPS, STATE_DTYPES, Precision

DEFAULT_NORM: Final = 1.0
"""What gradients are clipped to where nothing else is asked for."""

DESCRIPTION: Final = """\
Train a byte-level GPT on any text, with the memory that it may take on the device and the host as byte budgets; what
exceeds them is kept in swap files. The result does not depend on the budgets. Under torchrun, on several ranks."""

EXAMPLES: Final = """\
examples:
  offload train                                           a small model on Python's own source
  offload train --params 120m --text book.txt --device-memory 96MiB --host-memory 600MiB --disk /tmp
  offload train --steps 5000 --checkpoint runs/a --checkpoint-every 500 --keep 2 --resume
  torchrun --nproc-per-node 2 -m offload train --params 25m --batch 16"""


def add_parser(commands: "argparse._SubParsersAction[Any]") -> argparse.ArgumentParser:
    """Add `train` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="train a byte-level GPT on text, within byte budgets",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(parser.add_argument_group("model and text").add_argument)
    _add_budgets(parser.add_argument_group("budgets and disks").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)
    checkpoints.add_options(parser.add_argument_group("checkpoints").add_argument)
    add = parser.add_argument_group("output").add_argument
    add(
        "--log-every", type=at_least_one, metavar="N",
        help="a line for every N-th step (default: at most one a second, or a bar on a terminal)",
    )  # fmt: skip
    add("--json", metavar="PATH", help="write the run's figures there; - is standard output")
    return parser


def _add_model(add: Callable[..., Any]) -> None:
    add(
        "--params", type=checked(parse_count), default="5m", metavar="COUNT",
        help="size: 5m, 25m, 120m, 1b or a count (default: %(default)s)",
    )  # fmt: skip
    add("--text", type=path, metavar="PATH", help="file or folder to train on (default: Python's standard library)")
    add("--batch", type=at_least_one, default=8, metavar="N", help="sequences in a step (default: %(default)s)")
    add("--seq", type=at_least_one, default=128, metavar="N", help="bytes in a sequence (default: %(default)s)")


def _add_budgets(add: Callable[..., Any]) -> None:
    add(
        "--device-memory", type=byte_count, metavar="BYTES",
        help="what weights, gradients and state may take on the device, as 96MiB (default: half of what is free)",
    )  # fmt: skip
    add(
        "--host-memory", type=byte_count, metavar="BYTES",
        help="host memory of this machine, shared by its ranks, as 600MiB (default: what is free, less a margin; "
        "`offload doctor` tells how much that is)",
    )  # fmt: skip
    add("--disk", type=path, action="append", metavar="DIR", help="folder for swap files; give it again for more disks")
    add("--checksum", action="store_true", help="verify a checksum of every chunk that is read from disk")
    add(
        "--rated-tbw", type=terabytes, metavar="TB",
        help="terabytes written that the disk is rated for: projects its wear",
    )  # fmt: skip
    add(
        "--wait-timeout", type=wait_seconds, default=600.0, metavar="SECONDS",
        help="end with an error once nothing has moved on any lane, or a rank is missing, for that long "
        "(default: %(default)g)",
    )  # fmt: skip


def _add_training(add: Callable[..., Any]) -> None:
    add("--steps", type=at_least_one, default=50, metavar="N", help="optimizer steps (default: %(default)s)")
    add("--lr", type=learning_rate, default=1e-3, metavar="RATE", help="learning rate (default: %(default)s)")
    add("--seed", type=seed, default=0, metavar="N", help="of weights and of the text's windows (default: %(default)s)")
    add(
        "--max-grad-norm", type=norm, metavar="NORM",
        help="clip to this norm, or none (default: 1.0; none with --overlap backward)",
    )  # fmt: skip
    add(
        "--precision", type=dtype_name, choices=[str(p) for p in Precision], default="bf16",
        help="of weights and gradients (default: %(default)s)",
    )  # fmt: skip
    add(
        "--state-dtype", type=dtype_name, choices=STATE_DTYPES, default="fp32",
        help="of Adam's moments (default: %(default)s)",
    )  # fmt: skip
    add(
        "--overlap", choices=OVERLAPS, default="forward",
        help="what the optimizer's step overlaps (default: %(default)s)",
    )  # fmt: skip


def max_grad_norm_of(options: argparse.Namespace) -> float | None:
    """What to clip to: by default nothing where blocks are stepped before the norm is known."""
    default = None if options.overlap == "backward" else DEFAULT_NORM
    chosen: float | None = options.max_grad_norm if options.max_grad_norm is not None else default
    return None if chosen == math.inf else chosen
