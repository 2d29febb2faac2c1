"""What the user asked for, checked once at the door.

Owns: the frozen configuration of a session and the table of precisions.
Does not: know the model or the machine; plain numbers travel on from here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import torch

from offload.errors import ConfigError
from offload.units import parse_bytes

MAX_SKIPPED_STEPS: Final = 100
"""A loss scale would have been halved a hundred times."""


OVERLAPS: Final = ("forward", "backward", "off")

REDUCE_DTYPES: Final = ("fp32", "working")

STATE_DTYPES: Final = ("fp32", "bf16", "8bit")


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
    precision: str,
    max_grad_norm: float | None,
    accumulate: int | None,
    wait_timeout_s: float,
    max_skipped_steps: int = MAX_SKIPPED_STEPS,
    state_dtype: str = "fp32",
    checksum: bool = False,
    overlap: str = "forward",
    reduce_dtype: str = "fp32",
) -> Config:
    """Parse and check the arguments of `enable`; raises ConfigError naming the argument and its remedy."""
    _check_choice("precision", precision, tuple(map(str, Precision)))
    _check_choice("overlap", overlap, OVERLAPS)
    _check_choice("state_dtype", state_dtype, STATE_DTYPES)
    _check_choice("reduce_dtype", reduce_dtype, REDUCE_DTYPES)
    _check_numbers(max_grad_norm, accumulate, wait_timeout_s)
    if overlap == "backward":
        _check_step_in_backward(precision, max_grad_norm, accumulate)
    folders = () if disk is None else (disk,) if isinstance(disk, str | Path) else tuple(disk)
    if disk_space is not None and not folders:
        raise ConfigError(f"disk_space={disk_space!r} was given without disk=; name a folder for the swap files.")
    return Config(
        device_bytes=None if device_memory is None else parse_bytes(device_memory, name="device_memory"),
        host_bytes=None if host_memory is None else parse_bytes(host_memory, name="host_memory"),
        disk_folders=tuple(Path(folder) for folder in folders),
        disk_bytes=None if disk_space is None else parse_bytes(disk_space, name="disk_space"),
        precision=Precision(precision),
        max_grad_norm=max_grad_norm,
        accumulate=accumulate,
        wait_timeout_s=wait_timeout_s,
        max_skipped_steps=max_skipped_steps,
        state_dtype=state_dtype,
        checksum=checksum,
        overlap=overlap,
        reduce_dtype=reduce_dtype,
    )


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, choices))}.")


def _check_numbers(max_grad_norm: float | None, accumulate: int | None, wait_timeout_s: float) -> None:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ConfigError(
            f"max_grad_norm={max_grad_norm!r} must be more than 0; leave it out to train without clipping."
        )
    if accumulate is not None and (isinstance(accumulate, bool) or accumulate < 1):
        raise ConfigError(
            f"accumulate={accumulate!r} must be a whole number of backwards per step, at least 1, or None."
        )
    if not wait_timeout_s > 0:
        raise ConfigError(f"wait_timeout_s={wait_timeout_s!r} must be more than 0 seconds.")


def _check_step_in_backward(precision: str, max_grad_norm: float | None, accumulate: int | None) -> None:
    if precision == "fp16" or max_grad_norm is not None or accumulate is None:
        raise ConfigError(
            'overlap="backward" steps before the norm of all gradients is known, so it goes with fp32 and bf16 alone, '
            f"without max_grad_norm, and with accumulate= given; found precision={precision!r}, "
            f'max_grad_norm={max_grad_norm!r}, accumulate={accumulate!r}. Use overlap="forward".'
        )


def gradient_precision(config: Config) -> Precision:
    """Dtype of gradients at home: the working dtype for one backward per step, fp32 for sums."""
    return config.precision if config.accumulate == 1 else Precision.FP32
