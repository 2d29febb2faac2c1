"""`offload export`: a checkpoint in the format of others, without a GPU and without the model's code.

Owns: its options, what it says and the figures it writes.
Does not: convert or write (checkpoint/formats.py).
Threads: the main thread.
"""

import argparse
import sys
import time
from typing import Any, Final

from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.formats import DTYPES, FORMATS, HF, export
from offload.checkpoint.format.reader import Checkpoint
from offload.cli.numbers import path
from offload.errors import ConfigError
from offload.report.console import Console
from offload.report.results import STANDARD_OUTPUT, check_result_path, write_result
from offload.units import format_bytes

EPILOG: Final = """\
hf:   safetensors for `from_pretrained`. Put config.json and the tokenizer into OUT yourself:
      model.config.save_pretrained(OUT).
dcp:  weights, moments and steps for torch.distributed.checkpoint, under "model" and "optim"."""


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add `export` to the command line."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint in the format of others",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=path, metavar="CHECKPOINT", help="its folder, or that of a run, whose latest one is taken")
    add("out", type=path, metavar="OUT", help="a folder; made where it is missing, and must not hold a model")
    add("--format", choices=FORMATS, default=HF, help="Hugging Face or torch.distributed (default: %(default)s)")
    add("--dtype", choices=tuple(DTYPES), help="of all parameters (default: what each had before training)")
    add("--json", metavar="PATH", help="write what was exported there; - is standard output")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry out `offload export`; returns the exit code."""
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    check_result_path(options.json)
    begin_s = time.perf_counter()
    try:
        checkpoint = Checkpoint(options.checkpoint)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error  # nothing was done: an argument that cannot be used
    with checkpoint:
        exported = export(checkpoint, options.out, to=options.format, dtype=options.dtype)
        step = checkpoint.step
    console.line(
        f"{exported.num_tensors} tensors, {format_bytes(exported.num_bytes)}, of step {step} "
        f"in {len(exported.files)} files: {exported.folder}"
    )
    if options.format == HF and not (exported.folder / "config.json").exists():
        console.line("config.json is not there yet: model.config.save_pretrained(OUT) writes it.")
    if options.json is not None:
        figures = {
            "checkpoint": str(checkpoint.folder),
            "step": step,
            "format": options.format,
            "dtype": options.dtype,
            "folder": str(exported.folder),
            "files": list(exported.files),
            "num_tensors": exported.num_tensors,
            "num_bytes": exported.num_bytes,
            "seconds": time.perf_counter() - begin_s,
        }
        write_result(options.json, figures)
    return 0
