"""`offload bench adam`: what its result holds, that every contender makes the step that it is timed for, and what it
says to arguments that it cannot use."""

import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.commands.adam import RATIOS
from benchmarks.commands.adam_arrays import AdamArrays
from benchmarks.commands.adam_contenders import MODES, Mode, OurStep, ReferenceStreams
from benchmarks.commands.peers import TorchStep
from offload.cli.exit_codes import UNUSABLE
from offload.cli.main import main
from offload.kernels.workers import TASK_NUMEL, Workers

NUMEL = TASK_NUMEL + 1001
"""Two tasks, and a tail of vectors and of 8-bit blocks."""
ROUNDS = 3
STEPS = 3

WORKER_S = 0.25
"""What the double of DeepSpeed's process says a step took."""
WORKER = f"""\
import json, os, sys
with os.fdopen(int(sys.argv[2]), "w", buffering=1) as answers:
    for line in sys.stdin:
        prepared = {{"versions": {{"deepspeed": "9.9", "torch": "8.8"}}}}
        answers.write(json.dumps(prepared if line.startswith("prepare") else {{"seconds": {WORKER_S}}}) + "\\n")
"""
ISSUE_RATIOS = {
    "bandwidth_share", "bandwidth_share_fp16",
    "vs_torch_with_casts", "vs_deepspeed_with_casts", "split_vs_torch_with_casts", "split_vs_deepspeed_with_casts",
    "split_master_vs_fused", "bf16_state_vs_fused", "eightbit_vs_fused",
}  # fmt: skip


def interpreter(folder: Path, words: str) -> Path:
    """A program in the place of the Python that has DeepSpeed."""
    program = folder / "python-of-deepspeed"
    program.write_text(f"#!/bin/sh\n{words}\n")
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one run with everything that can take part; DeepSpeed's process is a double that speaks its protocol."""
    folder = tmp_path_factory.mktemp("bench")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    python = interpreter(folder, f'exec "{sys.executable}" "{worker}" "$@"')
    code = main(
        ["bench", "adam", "--numel", str(NUMEL), "--rounds", str(ROUNDS), "--threads", "1", "--seed", "5",
         "--json", str(folder / "adam.json"), "--deepspeed-python", str(python)]
    )  # fmt: skip
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict:
    return json.loads((folder / "adam.json").read_text())


# -------------------------------------------------------------------------------------------------- the result


def test_every_contender_has_a_sample_of_every_round(result: dict) -> None:
    assert {len(seconds) for seconds in result["samples"].values()} == {ROUNDS}
    assert result["samples"].keys() == result["contenders"].keys()
    assert {mode.name for mode in MODES} < result["samples"].keys()
    assert all(second > 0 for seconds in result["samples"].values() for second in seconds)


def test_ratios_are_medians_of_the_ratios_of_each_round(result: dict) -> None:
    assert result["ratios"].keys() == RATIOS.keys()
    assert result["ratios"].keys() >= ISSUE_RATIOS
    for name, ratio in result["ratios"].items():
        over, under = (result["samples"][term] for term in result["ratio_terms"][name])
        assert ratio == pytest.approx(statistics.median(a / b for a, b in zip(over, under, strict=True)))


def test_the_torch_that_is_compared_with_is_the_quicker_one(result: dict) -> None:
    medians = {name: statistics.median(seconds) for name, seconds in result["samples"].items()}
    rivals = [name for name in medians if name.startswith("torch") and name.endswith("with_casts")]
    assert result["ratio_terms"]["vs_torch_with_casts"] == [min(rivals, key=medians.__getitem__), "fused"]


def test_speeds_are_the_bytes_by_the_median_seconds(result: dict) -> None:
    for name, figures in result["contenders"].items():
        median_s = statistics.median(result["samples"][name])
        assert figures["median_s"] == pytest.approx(median_s)
        assert figures["gb_per_s"] == pytest.approx(figures["bytes"] / median_s / 1e9)
    per_parameter = {name: figures["bytes"] / NUMEL for name, figures in result["contenders"].items()}
    assert per_parameter["fused"] == per_parameter["reference"] == 28
    assert per_parameter["split"] == 26
    assert per_parameter["bf16_state"] == 18
    assert per_parameter["torch_fused_with_casts"] == per_parameter["deepspeed_with_casts"] == 40


def test_what_the_cores_alone_take_is_told_of_each_of_our_kernels(result: dict) -> None:
    assert result["core_s"].keys() == {mode.name for mode in MODES}
    for name, core_s in result["core_s"].items():
        assert core_s > 0
        assert result["core_shares"][name] == pytest.approx(core_s / statistics.median(result["samples"][name]))


def test_a_result_can_be_repeated_and_names_no_path_of_this_machine(result: dict, folder: Path) -> None:
    assert result["command"].startswith(f"offload bench adam --numel={NUMEL} --threads=1 --rounds={ROUNDS} --seed=5")
    assert str(folder) not in json.dumps(result)
    assert (result["numel"], result["threads"], result["rounds"]) == (NUMEL, 1, ROUNDS)
    assert result["seeds"] == {"values": 5}
    assert {"python", "torch", "numpy", "numba"} <= result["versions"].keys()
    assert {"cpu", "cores", "memory_bytes", "vector_features", "huge_pages"} <= result["machine"].keys()


def test_the_seconds_and_versions_of_another_process_are_its_own(result: dict) -> None:
    assert result["samples"]["deepspeed"] == [WORKER_S] * ROUNDS
    assert result["versions"]["deepspeed"] == "9.9"
    assert result["versions"]["deepspeed_torch"] == "8.8"


def test_the_chart_is_well_formed_and_has_a_bar_for_every_contender(result: dict, folder: Path) -> None:
    root = ElementTree.parse(folder / "adam.svg").getroot()
    bars = root.findall(".//{http://www.w3.org/2000/svg}rect[@class='bar']")
    assert len(bars) == len(result["samples"])
    words = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {figures["words"] for figures in result["contenders"].values()} < words


def test_a_peer_that_does_not_work_is_a_row_that_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python = interpreter(tmp_path, "echo 'no compiler here' >&2; exit 1")
    arguments = ["bench", "adam", "--numel", "1000", "--rounds", "1", "--json", "-", "--deepspeed-python", str(python)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "no compiler here" in result["contenders"]["deepspeed"]["absent"]
    assert "deepspeed" not in result["samples"]
    assert result["ratios"]["vs_deepspeed_with_casts"] is None
    assert result["ratios"]["vs_torch_with_casts"] > 0
    assert "DeepSpeedCPUAdam: installed, but it does not work: no compiler here" in err


# ------------------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_each_of_our_modes_makes_the_step_that_torch_makes(mode: Mode) -> None:
    # fp32 and bf16 gradients have the same values here, so that torch steps the same; fp16 ones are nearer to fp32
    ours, theirs = AdamArrays(NUMEL, seed=1), AdamArrays(NUMEL, seed=1)
    if mode.dtype == "fp16":
        theirs["gradient_fp32"].copy_(theirs["gradient_fp16"].view(torch.float16))
    if mode.master == "split":
        theirs["master"].copy_(theirs["weights"].view(torch.bfloat16))  # the remainder begins as 0
    start = theirs["master"].clone()
    torch_step = TorchStep(theirs, fused=True)
    with Workers(2) as workers:
        our_step = OurStep(ours, mode, workers)
        for _ in range(STEPS):
            our_step.step()
            torch_step.step()
    moved = theirs["master"] - start
    assert (moved.abs() > 0).all()
    # Of the way that an element went: moments are rounded to 8 bits of mantissa, or to entries of a map. A map stores
    # the least of a block as 0 and so leaves some far off: nearly all elements are looked at, in every tenth of them.
    tolerance = {"fp32": 1e-3, "bf16": 1e-2, "8bit": 0.05}[mode.state]
    error = (master_of(ours, mode) - theirs["master"]).abs() / moved.abs().median()
    for part in error.chunk(10):
        assert part.quantile(0.95) < tolerance


def master_of(arrays: AdamArrays, mode: Mode) -> torch.Tensor:
    if mode.master == "plain":
        return arrays["master"]
    weights, remainder = arrays.bits("weights_split").astype(np.uint32), arrays.bits("remainder").view(np.int16)
    return torch.from_numpy(((weights << 16) + remainder.astype(np.uint32)).view(np.float32))


@pytest.mark.parametrize("fused", [True, False])
def test_torch_with_casts_takes_a_gradient_and_gives_weights_of_16_bits(fused: bool) -> None:
    arrays = AdamArrays(1000, seed=2)
    wanted = arrays["gradient_fp32"].clone()
    arrays["gradient_fp32"].zero_()
    TorchStep(arrays, fused=fused).step_with_casts()
    assert torch.equal(arrays["gradient_fp32"], wanted)
    assert torch.equal(arrays["weights"].view(torch.bfloat16), arrays["master"].bfloat16())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_reference_goes_over_every_element_and_leaves_the_values_of_the_others(dtype: str) -> None:
    arrays = AdamArrays(NUMEL, seed=3)
    master = arrays["master"].clone()
    arrays["weights"].zero_()
    with Workers(2) as workers:
        ReferenceStreams(arrays, dtype, workers).step()
    assert torch.equal(arrays["master"], master)
    written = arrays["weights"].view({"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    assert torch.equal(written, master.to(written.dtype))


# --------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["adam", "--numel", "0"], "--numel"),
        (["adam", "--numel", "1.5"], "--numel"),
        (["adam", "--numel", "99999999999999"], "memory"),
        (["adam", "--threads", "0"], "--threads"),
        (["adam", "--threads", "100000"], "cores"),
        (["adam", "--rounds", "none"], "--rounds"),
        (["adam", "--seed", "-1"], "--seed"),
        (["adam", "--json", "no/such/folder/out.json"], "--json no/such/folder/out.json"),
        (["adam", "--json", "out.svg"], "--json out.svg"),
        (["adam", "--deepspeed-python", "no/such/python"], "--deepspeed-python no/such/python"),
        (["adam", "--no-such-option"], "--no-such-option"),
        (["no-such-benchmark"], "no-such-benchmark"),
        ([], "BENCHMARK"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(
    arguments: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["bench", *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code == UNUSABLE
    assert out == ""
    assert err.count("\n") == 1
    assert "error:" in err
    assert names in err
