"""`offload export`: what it writes, what it says, what it refuses, and what it does without."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from offload.checkpoint.format.formats import export, open_stored
from offload.checkpoint.format.load import load
from offload.checkpoint.format.reader import Checkpoint
from offload.cli.exit_codes import FAILED, UNUSABLE
from offload.cli.main import main
from offload.errors import ConfigError
from tests.checkpoint.memory import Sink, State, random_state, save, small_model

pytestmark = pytest.mark.filterwarnings("error")  # a command says only what it means to say


@pytest.fixture
def state(rng: np.random.Generator) -> State:
    return random_state(small_model(split=True), rng)


@pytest.fixture
def run_folder(tmp_path: Path, state: State) -> Path:
    save(tmp_path / "run", state, step=12)
    return tmp_path / "run"


def command(*arguments: object) -> int:
    try:
        return main(["export", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def test_the_latest_checkpoint_of_a_run_is_written_as_safetensors(
    run_folder: Path, state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run_folder, tmp_path / "out", "--dtype", "bf16") == 0
    found = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["embed.weight"].view(-1), state.state_tensors["embed.weight", "weights"])
    out, err = capsys.readouterr()
    assert f"of step 12 in 1 files: {tmp_path / 'out'}" in out
    assert "config.json is not there yet" in out
    assert err == ""


def test_json_on_standard_output_is_all_that_is_there(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run_folder, tmp_path / "out", "--json", "-") == 0
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert figures.pop("seconds") > 0
    assert figures == {
        "checkpoint": str(run_folder / "step-00000012"),
        "step": 12,
        "format": "hf",
        "dtype": None,
        "folder": str(tmp_path / "out"),
        "files": ["model.safetensors"],
        "num_tensors": 7,
        "num_bytes": sum(
            t.nbytes for t in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors").values()
        ),
    }
    assert "of step 12" in err


def test_json_goes_to_a_file_too(run_folder: Path, tmp_path: Path) -> None:
    assert command(run_folder, tmp_path / "out", "--json", tmp_path / "figures.json") == 0
    assert json.loads((tmp_path / "figures.json").read_text())["step"] == 12


@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_what_was_exported_can_be_loaded_by_its_path_alone(
    run_folder: Path, state: State, tmp_path: Path, to: str
) -> None:
    assert command(run_folder, tmp_path / "out", "--format", to, "--dtype", "fp32") == 0
    for path in (run_folder, tmp_path / "out"):
        sink = Sink(state.items)
        with open_stored(path, sink.items()) as reader:
            load(reader, sink)
        names = [
            key
            for key in state.state_tensors
            if key[1] in ("weights", "remainder") or to == "dcp" or path == run_folder
        ]
        for key in names:
            assert torch.equal(sink.state.state_tensors[key], state.state_tensors[key])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing", "out"], "missing holds no checkpoint"),
        (["run", "out", "--dtype", "int8"], "--dtype"),
        (["run", "out", "--format", "gguf"], "--format"),
        (["run", "out", "--json", "no/such/folder/x.json"], "--json no/such/folder/x.json"),
        (["run", "out", "--json", "run"], "--json run cannot be written"),
        (["run"], "OUT"),
    ],
)
def test_an_argument_that_cannot_be_used_is_one_line_and_nothing_is_written(
    run_folder: Path,
    tmp_path: Path,
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*arguments) == UNUSABLE
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_a_failure_that_names_it(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next((run_folder / "step-00000012").glob("*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-40] + bytes(40))
    assert command(run_folder, tmp_path / "out") == FAILED
    assert f"CorruptCheckpointError: {path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_formats_and_dtypes_that_there_are_not_are_refused(run_folder: Path, tmp_path: Path) -> None:
    with Checkpoint(run_folder) as checkpoint:
        with pytest.raises(ConfigError, match="expected one of hf, dcp"):
            export(checkpoint, tmp_path / "out", to="gguf")
        with pytest.raises(ConfigError, match="expected one of bf16, fp16, fp32"):
            export(checkpoint, tmp_path / "out", dtype="float64")


def test_neither_a_model_nor_the_slow_imports_are_needed(run_folder: Path, tmp_path: Path) -> None:
    """An export to Hugging Face imports nothing of transformers, safetensors or torch.distributed.checkpoint."""
    slow = ("transformers", "safetensors", "torch.distributed.checkpoint")
    program = f"""
import sys
from offload.cli.main import main
code = main(["export", {str(run_folder)!r}, {str(tmp_path / "out")!r}])
sys.exit(code or ", ".join(name for name in {slow!r} if name in sys.modules) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stderr) == (0, "")
