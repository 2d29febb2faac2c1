"""Arguments that cannot be used: one clear error each, before anything is allocated, and the forms that are taken.

The tables are the list of all of them: of `offload.enable`, and of the command line.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn

import offload
from offload.cli.exit_codes import UNUSABLE
from offload.cli.main import main
from offload.config import Precision, make_config
from offload.errors import ConfigError

NAN: Final = float("nan")
INF: Final = float("inf")

OPTIONS: Final[list[tuple[str, Any, str]]] = [
    *(("device_memory", value, "write it as 8GiB") for value in (True, 1.5, NAN, INF, -INF, "", "8 apples", [1], b"1")),
    *(("device_memory", value, "more than 0 bytes") for value in (0, -1, -1.0, "0", "0.1")),
    *(("device_memory", value, "write it as 8GiB") for value in ("-1GiB", "1e9", "nan", f"{'9' * 400}GiB")),
    *(("host_memory", value, "byte count|more than 0") for value in (True, 1.5, NAN, INF, -1, 0, "", "lots")),
    *(("disk_space", value, "byte count|more than 0") for value in (True, 1.5, NAN, INF, -1, 0, "", "lots")),
    *(("disk", value, "give the path of one") for value in ("", 5, 0, True, b"/", ["/", ""], ["/", None], {1})),
    ("disk", "~nobody-of-this-name/swap", "write the path without ~"),
    ("disk", "/no/such/folder", "make it, or name one that exists"),
    ("disk", __file__, "is not a folder"),
    *(("precision", value, "use one of 'fp32', 'bf16', 'fp16'") for value in ("fp8", "", None, 16, True, torch.int8)),
    *(("max_grad_norm", value, "a number of more than 0") for value in (True, "1", 0, 0.0, -1, NAN, -INF, [1.0], "")),
    *(("accumulate", value, "a whole number .* at least 1") for value in (1.5, 0, -1, True, "2", NAN, INF, [2])),
    *(("max_skipped_steps", value, "a whole number .* at least 1") for value in (1.5, 0, -1, True, "2", None, NAN)),
    *(("overlap", value, "use one of 'forward', 'backward', 'off'") for value in (None, True, "both", "", 1, ["off"])),
    *(("state_dtype", value, "use one of 'fp32', 'bf16', '8bit'") for value in (None, "fp16", 8, torch.float16, "")),
    *(("reduce_dtype", value, "use one of 'fp32', 'working'") for value in (None, "bf16", torch.bfloat16, 32)),
    *(("checksum", value, "True nor False") for value in ("yes", 1, 0, None, "False")),
    *(("wait_timeout_s", value, "a number of seconds") for value in ("x", "600", None, True, 0, -1, NAN, INF, 1e12)),
    *(("device", value, "name one as 'cuda', 'cuda:1' or 'cpu'") for value in ("gpu", "", 3.5, 0, True, "cpu:x", nn)),
    ("device", "cpu:3", "use device='cpu'"),
    ("device", torch.device("cpu", 3), "use device='cpu'"),
    ("device", "meta", "device='cpu'"),
    *(("process_group", value, "init_process_group") for value in ("nccl", 0, object)),
]  # fmt: skip
"""Argument, what it got, what it says that it takes."""

COMBINATIONS: Final[list[tuple[dict[str, Any], str]]] = [
    ({"disk_space": "1GiB"}, "disk_space='1GiB' was given without disk="),
    ({"disk_space": "1GiB", "disk": []}, "disk_space='1GiB' was given without disk="),
    ({"overlap": "backward", "accumulate": 1, "precision": "fp16"}, "found precision='fp16'"),
    ({"overlap": "backward", "accumulate": 1, "max_grad_norm": 1}, "max_grad_norm=1.0"),
    ({"overlap": "backward"}, "accumulate=None"),
    ({"device_memory": "900TiB", "device": "cpu"}, "device_memory is 900.00 TiB"),
    ({"host_memory": "900TiB"}, "host_memory is 900.00 TiB"),
]

SUBJECTS: Final[list[tuple[str, Callable[[nn.Module], tuple[Any, Any]], str]]] = [
    ("model", lambda m: (None, None), "model is a NoneType; pass the torch.nn.Module"),
    ("model", lambda m: (nn.Linear, None), "model is the class Linear; pass the torch.nn.Module"),
    ("model", lambda m: (list(m.parameters()), None), "model is a list; pass the torch.nn.Module"),
    ("model and optimizer", lambda m: (sgd(m), m), "model is a SGD; pass the torch.nn.Module"),
    ("optimizer", lambda m: (m, torch.optim.AdamW), "optimizer is the class AdamW; pass an optimizer of the model's"),
    ("optimizer", lambda m: (m, m.parameters()), "optimizer is a generator; pass an optimizer of the model's"),
    ("optimizer", lambda m: (m, "adamw"), "optimizer is a str; pass an optimizer of the model's"),
    ("optimizer", lambda m: (m, m), "optimizer is a Linear; pass an optimizer of the model's"),
    ("optimizer", lambda m: (m, torch.optim.lr_scheduler.StepLR(sgd(m), 1)), "optimizer is a StepLR, a scheduler"),
    (
        "optimizer",
        lambda m: (m, torch.optim.lr_scheduler.ReduceLROnPlateau(sgd(m))),
        "optimizer is a ReduceLROnPlateau, a scheduler",
    ),
    ("lr", lambda m: (m, torch.optim.AdamW(m.parameters(), lr=INF)), "group 0 of the optimizer has lr=inf"),
]

COMMANDS: Final[list[tuple[list[str], str]]] = [
    *((["--rated-tbw", value], "TBW") for value in ("0", "nan", "-5", "inf", "many", "")),
    *((["--lr", value], "a finite number of at least 0") for value in ("nan", "-1", "inf", "1e999", "fast", "")),
    *((["--seed", value], "a whole number from 0 to") for value in ("-1", "1.5", "x", "1e3", str(2**64), "9" * 5000)),
    *((["--max-grad-norm", value], "more than 0 nor none") for value in ("0", "-1", "nan", "None", "")),
    *((["--wait-timeout", value], "a number of seconds") for value in ("0", "-1", "nan", "inf", "1e12", "soon")),
    *((["--steps", value], "a whole number of at least 1") for value in ("0", "-1", "1.5", "x", "9" * 20, "\u0663")),
    *((["--batch", value], "a whole number of at least 1") for value in ("0", "-1", "1.5", "nan")),
    *((["--seq", value], "a whole number of at least 1") for value in ("0", "-1", "1.5", "nan")),
    *((["--log-every", value], "a whole number of at least 1") for value in ("0", "-1", "1.5", "nan")),
    *((["--keep", value, "--checkpoint", "x"], "a whole number of at least 1") for value in ("0", "-1", "x")),
    *((["--checkpoint-every", value, "--checkpoint", "x"], "a whole number of at least 1") for value in ("0", "x")),
    *((["--device-memory", value], "8GiB|more than 0") for value in ("lots", "0", "-1", "nan", "1.5.5GiB", "")),
    *((["--host-memory", value], "8GiB|more than 0") for value in ("lots", "0", "-1", "nan", "1.5.5GiB", "")),
    *((["--params", value], "--params") for value in ("big", "0", "-5", "nan", "9" * 400, "99999999b", "")),
    *((["--precision", value], "invalid choice") for value in ("int8", "fp8", "")),
    *((["--state-dtype", value], "invalid choice") for value in ("int8", "fp16", "float16", "")),
    *((["--overlap", value], "invalid choice") for value in ("none", "both", "")),
    *((["--text", value], "--text") for value in ("no/such/file", "", "/dev/null")),
    *((["--disk", value], "--disk") for value in ("no/such/folder", "", __file__, "~nobody-of-this-name/x")),
    *((["--checkpoint", value], "--checkpoint") for value in (__file__, f"{__file__}/run", "/proc/run", "")),
    *((["--json", value], "--json") for value in ("no/such/folder/out.json", "/", "")),
    (["--batch", "999999999999"], "lower one of them"),
    (["--seq", "999999999999"], "shorter sequences"),
    (["--params", "10"], "the smallest has"),
    (["--resume"], "--resume needs --checkpoint DIR"),
    (["--keep", "2"], "--keep needs --checkpoint DIR"),
    (["--checkpoint-every", "2"], "--checkpoint-every needs --checkpoint DIR"),
    (["--overlap", "backward", "--precision", "fp16"], "found precision='fp16'"),
    (["--overlap", "backward", "--max-grad-norm", "1"], "max_grad_norm=1.0"),
    (["--checksum", "yes"], "unrecognized arguments: yes"),
    (["--no-such-option"], "unrecognized arguments"),
    (["extra"], "unrecognized arguments"),
]  # fmt: skip
"""Arguments of `offload train`, and what its one line says."""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def refused(model: Any, optimizer: Any, folder: Path, **options: Any) -> str:
    """The message of the ConfigError of `enable`."""
    with pytest.raises(ConfigError) as raised:
        offload.enable(model, optimizer, **options)
    assert list(folder.iterdir()) == []
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(("name", "value", "takes"), OPTIONS, ids=lambda value: str(value)[:30])
def test_an_argument_is_named_with_what_it_got_and_what_it_takes(
    name: str, value: Any, takes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(4, 4)
    options = {"device": "cpu"} | ({"disk": tmp_path} if name == "disk_space" else {}) | {name: value}
    message = refused(model, sgd(model), tmp_path, **options)
    # repr, for a long text its beginning; a path or a device may be shown as its text
    assert f"{name}={value!r}"[:60] in message or f"{name}={str(value)!r}" in message
    assert re.search(takes, message), message


@pytest.mark.parametrize(("options", "says"), COMBINATIONS)
def test_arguments_that_do_not_go_together_are_named(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    assert says in refused(model, sgd(model), tmp_path, **options)


@pytest.mark.parametrize(("what", "make", "says"), SUBJECTS)
def test_what_is_neither_a_model_nor_its_optimizer_is_named(
    what: str, make: Callable[[nn.Module], tuple[Any, Any]], says: str, tmp_path: Path
) -> None:
    assert says in refused(*make(nn.Linear(4, 4)), tmp_path)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        *((form, Precision.BF16) for form in ("bf16", "bfloat16", torch.bfloat16, Precision.BF16)),
        *((form, Precision.FP16) for form in ("fp16", "float16", torch.float16)),
        *((form, Precision.FP32) for form in ("fp32", "float32", torch.float32)),
    ],
)
def test_a_precision_is_taken_in_all_forms(precision: Any, expected: Precision) -> None:
    assert configured(precision=precision).precision is expected


def test_whole_floats_paths_and_home_folders_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = configured(
        device_memory=2.0**20, host_memory=float(3 << 20), disk_space=5e6, accumulate=2.0, max_skipped_steps=7.0,
        max_grad_norm=1, wait_timeout_s=5, state_dtype=torch.bfloat16, reduce_dtype="float32",
        disk=["~/one", tmp_path / "two", Path("~")],
    )  # fmt: skip
    assert (config.device_bytes, config.host_bytes, config.disk_bytes) == (1 << 20, 3 << 20, 5_000_000)
    assert (config.accumulate, config.max_skipped_steps) == (2, 7)
    assert all(type(number) is int for number in (config.device_bytes, config.accumulate, config.max_skipped_steps))
    assert (config.max_grad_norm, config.wait_timeout_s) == (1.0, 5.0)
    assert (config.state_dtype, config.reduce_dtype) == ("bf16", "fp32")
    assert config.disk_folders == (tmp_path / "one", tmp_path / "two", tmp_path)


def configured(**options: Any) -> Any:
    absent = dict.fromkeys(("device_memory", "host_memory", "disk", "disk_space", "max_grad_norm", "accumulate"))
    return make_config(**(absent | {"precision": "bf16", "wait_timeout_s": 600.0} | options))


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(("arguments", "says"), COMMANDS, ids=lambda value: "".join(value)[:40])
def test_a_bad_argument_of_train_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tiny = ["--params", "1m", "--device-memory", "64MiB", "--host-memory", "64MiB"]
    assert exit_code_of(["train", *tiny, *arguments]) == UNUSABLE
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "error: " in err
    assert re.search(says, err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["doctor", "--disk", "no/such/folder"], "no/such/folder is not a folder"),
        (["doctor", "--disk", ""], "names no file or folder"),
        (["export", "", "out"], "names no file or folder"),
        (["doctor", "--clean", "no/such/folder"], "no/such/folder is not a folder"),
        (["export", "no/such/run", "out"], "no/such/run"),
        (["export", __file__, "out"], "test_arguments.py"),
        (["export", "no/such/run", "out", "--format", "gguf"], "invalid choice"),
        (["export", "no/such/run", "out", "--dtype", "int8"], "invalid choice"),
        (["export", "no/such/run", "out", "--json", "no/such/folder/x"], "--json no/such/folder/x"),
        (["bench", "disk", "--disk", "no/such/folder"], "no/such/folder"),
        (["bench", "no-such-benchmark"], "invalid choice"),
        (["no-such-command"], "invalid choice"),
    ],
)
def test_a_bad_argument_of_other_commands_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert exit_code_of(arguments) == UNUSABLE
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert says in err
    assert list(tmp_path.iterdir()) == []


def exit_code_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
