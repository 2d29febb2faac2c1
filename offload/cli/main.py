"""The command line: subcommands, exit codes, errors as one line.

Owns: the parser, and what an error looks like to somebody at a terminal.
Does not: know any subcommand's options or work (one file each).
Threads: the main thread.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from offload.cli import bench, doctor, export, train
from offload.cli.exit_codes import FAILED, INTERRUPTED, UNUSABLE
from offload.errors import ConfigError, OffloadError
from offload.report.console import Console


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line: the usage text would bury what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(UNUSABLE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for these; each subcommand sets `run`, which takes the parsed options and returns an exit code."""
    parser = Parser(prog="offload", description="Train models that do not fit, within byte budgets.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train.add_command(commands)
    bench.add_command(commands, is_asked_for=arguments[:1] == ["bench"])
    export.add_command(commands)
    doctor.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors of ours are one line, all others keep their traceback."""
    arguments = sys.argv[1:] if argv is None else argv
    options = build_parser(arguments).parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    errors = Console(sys.stderr)
    try:
        return run(options)
    except ConfigError as error:
        errors.line(f"offload: error: {error}")
        return UNUSABLE
    except OffloadError as error:
        errors.line(f"offload: failed: {type(error).__name__}: {error}")
        return FAILED
    except KeyboardInterrupt:
        errors.line("offload: interrupted")
        return INTERRUPTED
