"""What the command line says to arguments that it cannot use: one line, exit code 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from offload.cli.exit_codes import UNUSABLE
from offload.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--device-memory", "lots"], "--device-memory"),
        (["--host-memory", "-5GiB"], "--host-memory"),
        (["--host-memory", "0"], "--host-memory"),
        (["--params", "big"], "--params"),
        (["--steps", "0"], "--steps"),
        (["--batch", "1.5"], "--batch"),
        (["--precision", "int8"], "--precision"),
        (["--params", "10"], "the smallest has"),
        (["--text", "no/such/file"], "no/such/file"),
        (["--json", "no/such/folder/out.json"], "--json no/such/folder/out.json"),
        (["--lr", "fast"], "--lr"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(["train", *arguments]) == UNUSABLE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "error:" in err
    assert names in err


def test_no_command_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of([]) == UNUSABLE
    assert capsys.readouterr().err.count("\n") == 1


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "offload", "train", "--device-memory", "lots"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == UNUSABLE
    assert done.stdout == ""
    assert done.stderr.startswith("offload train: error: argument --device-memory: ")
    assert "Traceback" not in done.stderr


def exit_code_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code
