"""`offload train` as a user runs it: a program, its exit code, its output and what it leaves behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.cli.exit_codes import INTERRUPTED, UNUSABLE
from offload.cli.main import main
from offload.units import MIB

TINY = ["--params", "1m", "--batch", "1", "--seq", "32", "--seed", "3"]
TIGHT = ["--device-memory", "2MiB", "--host-memory", "6MiB"]
ROOMY = ["--device-memory", "64MiB", "--host-memory", "64MiB"]
STEPS = 3

JSON_KEYS = {
    "params", "losses", "seconds_per_step", "tokens_per_s", "budget_bytes", "peak_bytes", "homes", "bytes_moved",
    "world_size", "wait_s", "unplanned_fetches", "disk_mode", "baseline_rss_bytes", "peak_rss_bytes", "weights_sha256",
}  # fmt: skip


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The figures of a run most of which is on disk."""
    folder = tmp_path_factory.mktemp("tight")
    result = figures(folder / "out.json", *TIGHT, "--disk", str(folder), "--steps", str(STEPS))
    assert [path.name for path in folder.iterdir()] == ["out.json"]
    return result


def test_a_run_reports_its_figures(tight: dict) -> None:
    assert tight.keys() == JSON_KEYS
    assert len(tight["losses"]) == STEPS
    assert tight["unplanned_fetches"][1:] == [0] * (STEPS - 1)
    assert tight["budget_bytes"] == {"device": 2 * MIB, "host": 6 * MIB, "disk": None}
    assert tight["peak_bytes"]["device"] <= 2 * MIB
    assert tight["peak_bytes"]["host"] <= 6 * MIB
    assert len(bytes.fromhex(tight["weights_sha256"])) == 32
    assert tight["baseline_rss_bytes"] > 100 * MIB


def test_every_step_is_in_the_figures_to_its_last_byte(tight: dict) -> None:
    # All state is on disk: each step reads and writes each of its bytes, the last step too; but the first step need not
    # read moments that were never stepped.
    state_bytes = tight["homes"]["state"]["disk"]
    assert state_bytes >= 10 * tight["params"]  # bf16: a split master
    assert tight["bytes_moved"]["read"] >= (STEPS - 1) * state_bytes
    assert tight["bytes_moved"]["write"] >= STEPS * state_bytes


def test_the_result_is_the_same_whatever_the_budgets(tight: dict, tmp_path: Path) -> None:
    roomy = figures(tmp_path / "out.json", *ROOMY, "--steps", str(STEPS))
    assert roomy["bytes_moved"]["read"] == roomy["bytes_moved"]["h2d"] == 0
    assert roomy["losses"] == tight["losses"]
    assert roomy["weights_sha256"] == tight["weights_sha256"]


def test_with_json_on_standard_output_everything_else_goes_to_standard_error() -> None:
    done = train(*ROOMY, "--steps", "1", "--json", "-")
    assert json.loads(done.stdout).keys() == JSON_KEYS
    assert "step 1/1" in done.stderr


def test_ctrl_c_ends_after_the_step_with_the_table_and_an_empty_swap_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "offload", "train", *TINY, *TIGHT, "--disk", str(tmp_path), "--steps", "100000"]
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
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_ends_as_the_uninterrupted_one(tight: dict, tmp_path: Path) -> None:
    run, out = str(tmp_path / "run"), tmp_path / "out.json"
    train(*ROOMY, "--steps", "2", "--checkpoint", run, "--checkpoint-every", "1", "--keep", "1")
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000002"]
    more = ["--disk", str(tmp_path), "--steps", str(STEPS), "--checkpoint", run, "--resume"]
    resumed = figures(out, *TIGHT, *more)
    assert resumed["losses"] == tight["losses"][2:]
    assert resumed["weights_sha256"] == tight["weights_sha256"]


def test_resuming_with_other_options_warns_once_and_says_which_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["train", *TINY, *ROOMY, "--checkpoint", str(tmp_path / "run"), "--resume", "--steps"]
    assert main([*run, "1"]) == 0
    assert main([*run, "2"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main([*run, "3", "--seed", "4", "--batch", "2", "--lr", "0.5"]) == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "--batch 2 is used from here on (it had 1)" in warning
    assert "--seed 4 has no effect" in warning
    assert "--lr 0.5 has no effect" in warning


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--resume"], "--checkpoint DIR"),
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


def figures(path: Path, *arguments: str) -> dict:
    """What a run wrote to `path` as JSON."""
    train(*arguments, "--json", str(path))
    return json.loads(path.read_text())
