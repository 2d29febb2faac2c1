"""What the user asked for, checked once at the door.

Owns: the frozen configuration of a session and the table of precisions; what each argument takes.
Does not: know the model or the machine; plain numbers travel on from here.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final

import torch

from offload.errors import ConfigError
from offload.units import parse_bytes

MAX_SKIPPED_STEPS: Final = 100
"""A loss scale would have been halved a hundred times."""

MAX_WAIT_S: Final = 366 * 86_400.0
"""A year. The clocks of threads and of torch.distributed overflow at some point beyond it."""

OVERLAPS: Final = ("forward", "backward", "off")

REDUCE_DTYPES: Final = ("fp32", "working")

STATE_DTYPES: Final = ("fp32", "bf16", "8bit")

DTYPE_NAMES: Final[Mapping[Any, str]] = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16",
}  # fmt: skip
"""Other forms in which dtypes are named."""


class Precision(StrEnum):
    """Working dtype of weights and gradients. The value is also the name that kernels use."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return _DTYPES[self]


_DTYPES: Final = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Arguments of `enable`, parsed. Bytes are None where the default (what is free, less a margin) applies."""

    device_bytes: int | None
    """Device budget of this rank; None: free device memory."""
    host_bytes: int | None
    """Host budget of this node; None: available host memory less a margin."""
    disk_folders: tuple[Path, ...]
    """Folders for swap files; none: nothing may go to disk."""
    disk_bytes: int | None
    """Disk budget of this node; None: 95 % of what is free."""
    precision: Precision
    max_grad_norm: float | None
    """Clip the global gradient norm to this; None: never clip."""
    accumulate: int | None
    """Backwards per step; 1 keeps gradients in the working dtype, None or more in fp32."""
    wait_timeout_s: float
    """How long nothing may move on any lane before a wait raises."""
    max_skipped_steps: int = MAX_SKIPPED_STEPS
    """Steps skipped in a row before an error."""
    state_dtype: str = "fp32"
    """How moments are stored: fp32, bf16 or 8bit."""
    overlap: str = "forward"
    """What the optimizer's step overlaps: forward, backward or off."""
    checksum: bool = False
    """Verify every read from disk."""
    reduce_dtype: str = "fp32"
    """In which gradients of several ranks are summed: fp32 or working."""


def make_config(
    *,
    device_memory: int | str | None,
    host_memory: int | str | None,
    disk: str | Path | Sequence[str | Path] | None,
    disk_space: int | str | None,
    precision: str | torch.dtype,
    max_grad_norm: float | None,
    accumulate: int | None,
    wait_timeout_s: float,
    max_skipped_steps: int = MAX_SKIPPED_STEPS,
    state_dtype: str | torch.dtype = "fp32",
    checksum: bool = False,
    overlap: str = "forward",
    reduce_dtype: str | torch.dtype = "fp32",
) -> Config:
    """Parse and check the arguments of `enable`; raises ConfigError naming the argument and its remedy."""
    folders = _folders(disk)
    if disk_space is not None and not folders:
        raise ConfigError(f"disk_space={disk_space!r} was given without disk=; name a folder for the swap files.")
    config = Config(
        device_bytes=None if device_memory is None else parse_bytes(device_memory, name="device_memory"),
        host_bytes=None if host_memory is None else parse_bytes(host_memory, name="host_memory"),
        disk_folders=folders,
        disk_bytes=None if disk_space is None else parse_bytes(disk_space, name="disk_space"),
        precision=Precision(_choice("precision", precision, tuple(map(str, Precision)))),
        max_grad_norm=None if max_grad_norm is None else _max_grad_norm(max_grad_norm),
        accumulate=None if accumulate is None else _accumulate(accumulate),
        wait_timeout_s=_wait_timeout_s(wait_timeout_s),
        max_skipped_steps=_max_skipped_steps(max_skipped_steps),
        state_dtype=_choice("state_dtype", state_dtype, STATE_DTYPES),
        checksum=_flag("checksum", checksum),
        overlap=_choice("overlap", overlap, OVERLAPS),
        reduce_dtype=_choice("reduce_dtype", reduce_dtype, REDUCE_DTYPES),
    )
    if config.overlap == "backward":
        _check_step_in_backward(config)
    return config


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of `choices`; a dtype in any of its forms."""
    is_name = isinstance(value, str | torch.dtype)
    found = DTYPE_NAMES.get(value, value) if is_name else None
    if found not in choices:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}.")
    return str(found)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} is neither True nor False; give one of them.")
    return value


def is_number(value: Any) -> bool:
    """A real number: True and False are none, nor is NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def whole_number(value: Any) -> int | None:
    """The integer that a number is (8, 8.0); None for everything else."""
    if not is_number(value) or math.isinf(value) or not (isinstance(value, Integral) or float(value).is_integer()):
        return None
    return int(value)


def _max_grad_norm(value: Any) -> float:
    if not is_number(value) or not value > 0:
        raise ConfigError(
            f"max_grad_norm={value!r} is not a number of more than 0; give the norm to clip to, or leave it out to "
            "train without clipping."
        )
    return float(value)


def _accumulate(value: Any) -> int:
    number = whole_number(value)
    if number is None or number < 1:
        raise ConfigError(f"accumulate={value!r} must be a whole number of backwards per step, at least 1, or None.")
    return number


def _wait_timeout_s(value: Any) -> float:
    if not is_number(value) or not 0 < value <= MAX_WAIT_S:
        raise ConfigError(
            f"wait_timeout_s={value!r} must be a number of seconds, more than 0 and at most {MAX_WAIT_S:.0f} (a year)."
        )
    return float(value)


def _max_skipped_steps(value: Any) -> int:
    number = whole_number(value)
    if number is None or number < 1:
        raise ConfigError(
            f"max_skipped_steps={value!r} must be a whole number of steps, at least 1: that many skipped in a row end "
            "the training."
        )
    return number


def _folders(disk: Any) -> tuple[Path, ...]:
    """The folders that `disk` names, with `~` replaced by the home folder."""
    if disk is None:
        return ()
    named = disk if isinstance(disk, Sequence) and not isinstance(disk, str | bytes) else (disk,)
    return tuple(_folder(disk, folder) for folder in named)


def _folder(disk: Any, folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder) or isinstance(os.fspath(folder), bytes):
        raise ConfigError(f"disk={disk!r} names no folder; give the path of one, or a list of paths.")
    try:
        return Path(folder).expanduser()
    except RuntimeError as error:  # "~name" of nobody
        raise ConfigError(f"disk={disk!r}: {error}; write the path without ~.") from error


def _check_step_in_backward(config: Config) -> None:
    if config.precision is Precision.FP16 or config.max_grad_norm is not None or config.accumulate is None:
        raise ConfigError(
            'overlap="backward" steps before the norm of all gradients is known, so it goes with fp32 and bf16 alone, '
            f"without max_grad_norm, and with accumulate= given; found precision={str(config.precision)!r}, "
            f'max_grad_norm={config.max_grad_norm!r}, accumulate={config.accumulate!r}. Use overlap="forward".'
        )


def gradient_precision(config: Config) -> Precision:
    """Dtype of gradients in their homes: the working dtype for one backward per step, fp32 for sums."""
    return config.precision if config.accumulate == 1 else Precision.FP32
