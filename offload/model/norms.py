"""Batch norms whose running statistics have another dtype than the working weights.

Owns: the hooks that give such a norm weights of the dtype of its statistics, during a call.
Does not: fetch the weights (hooks.py).
Threads: the training thread.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def widen(model: nn.Module, dtype: torch.dtype, opaque: Callable[[Any], Any]) -> list[Any]:
    """Statistics keep their dtype, and torch wants weight and bias in the same: copies of it, for each call.

    To be called after the hooks that acquire and release have been registered: between them the weights are there.
    Returns the handles of the hooks.
    """
    originals: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def before(wide: torch.dtype, norm: nn.Module, args: Any) -> None:
        originals[norm] = dict(norm._parameters)
        for name, parameter in originals[norm].items():
            norm._parameters[name] = None if parameter is None else parameter.to(wide)  # type: ignore[assignment]

    def after(norm: nn.Module, args: Any, output: Any) -> None:
        norm._parameters.update(originals.pop(norm, {}))

    before, after = opaque(before), opaque(after)
    handles: list[Any] = []
    for norm in model.modules():
        if isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_mean.dtype != dtype:
            handles.append(norm.register_forward_pre_hook(partial(before, norm.running_mean.dtype)))
            handles.append(norm.register_forward_hook(after, prepend=True, always_call=True))
    return handles
