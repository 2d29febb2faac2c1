"""`offload train` as a user runs it: a program, its exit code, its output and what it leaves behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.cli.exit_codes import INTERRUPTED, UNUSABLE
from offload.units import MIB

TINY = ["--params", "1m", "--batch", "1", "--seq", "32", "--seed", "3"]
TIGHT = ["--device-memory", "2MiB", "--host-memory", "6MiB"]

JSON_KEYS = {
    "params", "losses", "tokens_per_s", "budget_bytes", "peak_bytes", "homes", "bytes_moved", "wait_s",
    "unplanned_fetches", "disk_mode", "baseline_rss_bytes", "peak_rss_bytes", "weights_sha256",
}  # fmt: skip


@pytest.fixture
def swap(tmp_path: Path) -> Path:
    folder = tmp_path / "swap"
    folder.mkdir()
    return folder


def test_a_run_reports_its_figures_and_leaves_nothing_behind(swap: Path, tmp_path: Path) -> None:
    result = figures(tmp_path, *TIGHT, "--disk", str(swap), "--steps", "4")
    assert result.keys() == JSON_KEYS
    assert len(result["losses"]) == len(result["unplanned_fetches"]) == 4
    assert result["unplanned_fetches"][1:] == [0, 0, 0]
    assert result["budget_bytes"]["device"] == 2 * MIB
    assert result["budget_bytes"]["host"] == 6 * MIB
    for tier, peak_bytes in result["peak_bytes"].items():
        assert tier == "disk" or peak_bytes <= result["budget_bytes"][tier]
    assert result["homes"]["state"]["disk"] > 0
    assert result["bytes_moved"]["read"] > 0
    assert len(bytes.fromhex(result["weights_sha256"])) == 32
    assert 0 < result["baseline_rss_bytes"] < result["peak_rss_bytes"] * 2
    assert list(swap.iterdir()) == []


def test_the_result_is_the_same_whatever_the_budgets(swap: Path, tmp_path: Path) -> None:
    tight = figures(tmp_path, *TIGHT, "--disk", str(swap), "--steps", "3")
    roomy = figures(tmp_path, "--device-memory", "64MiB", "--host-memory", "64MiB", "--steps", "3")
    assert roomy["bytes_moved"].get("read", 0) == roomy["bytes_moved"].get("h2d", 0) == 0
    assert roomy["losses"] == tight["losses"]
    assert roomy["weights_sha256"] == tight["weights_sha256"]


def test_with_json_on_standard_output_everything_else_goes_to_standard_error() -> None:
    done = train("--steps", "1", "--host-memory", "64MiB", "--json", "-")
    assert json.loads(done.stdout).keys() == JSON_KEYS
    assert "step 1/1" in done.stderr


def test_ctrl_c_ends_after_the_step_with_the_table_and_an_empty_swap_folder(swap: Path) -> None:
    command = [sys.executable, "-m", "offload", "train", *TINY, *TIGHT, "--disk", str(swap), "--steps", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step"):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, errors
    assert "ending after this step" in rest
    assert "budget" in rest
    assert "device" in rest
    assert "Traceback" not in errors
    assert list(swap.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--device-memory", "64KiB"], "device_memory"),
        (["--device-memory", "2MiB", "--host-memory", "64KiB"], "host_memory"),
        (["--disk", "no/such/folder", *TIGHT], "no/such/folder"),
    ],
)
def test_what_cannot_be_trained_is_one_line_and_exit_code_2(arguments: list[str], names: str) -> None:
    command = [sys.executable, "-m", "offload", "train", *TINY, "--steps", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == UNUSABLE, done.stderr
    assert done.stderr.count("\n") == 1
    assert names in done.stderr


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "offload", "train", *TINY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def figures(tmp_path: Path, *arguments: str) -> dict:
    """What a run wrote as JSON."""
    path = tmp_path / "out.json"
    train(*arguments, "--json", str(path))
    return json.loads(path.read_text())
