"""Placeholder gradients: what stands in `p.grad` once the gradient has left the device.

Owns: the placeholder gradient type, and what user code may do with one.
Does not: know where the gradient is (gradients/intake.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from offload.errors import PlaceholderGradientError

_ALLOWED: Final = frozenset(
    {"detach", "detach_", "requires_grad_", "size", "dim", "numel", "element_size", "is_floating_point", "is_complex",
     "stride", "__repr__", "__hash__", "__format__", "data_ptr", "type", "nelement", "is_contiguous", "ndimension"}
)  # fmt: skip
"""Questions about shape and type: true without the values."""


class PlaceholderGradient(Tensor):
    """A NaN scalar in the parameter's shape. Zeroing is remembered; computing raises PlaceholderGradientError."""

    zeroed: bool

    @staticmethod
    def of(parameter: Tensor) -> "PlaceholderGradient":
        """A new placeholder gradient with the shape, dtype and device of `parameter`."""
        scalar = torch.full((), float("nan"), dtype=parameter.dtype, device=parameter.device)
        placeholder: PlaceholderGradient = torch.Tensor._make_subclass(
            PlaceholderGradient, scalar.expand(parameter.shape)
        )
        placeholder.zeroed = False
        return placeholder

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in ("__get__", "__set__") or name in _ALLOWED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in ("zero_", "_foreach_zero_"):
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            for tensor in tensors:
                if isinstance(tensor, PlaceholderGradient):
                    tensor.zeroed = True
                else:
                    tensor.zero_()
            return args[0]
        raise PlaceholderGradientError(
            f"{name} was called on p.grad, but the gradient has left the device; p.grad only stands for it. "
            "To clip, pass max_grad_norm= to offload.enable; to read gradients, use session.gathered_gradients(module)."
        )
