"""Deferred models: built without memory, filled module by module by their own `reset_parameters`.

Owns: the context in which a model is built on the meta device, and the materialising of one module.
Does not: decide where the values go (storage/).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from offload.errors import UnsupportedModelError


@contextmanager
def deferred_init() -> Iterator[None]:
    """Build a model in this context without allocating its parameters; `offload.enable` fills them.

    Every module that directly owns parameters must have `reset_parameters()` (all of torch.nn do), which sets its
    buffers too where it has any. Initial values that a constructor sets itself are lost.
    """
    with torch.device("meta"):
        yield


def is_deferred(module: nn.Module) -> bool:
    """Whether this module itself holds parameters or buffers without memory."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.is_meta for tensor in tensors)


def materialize(module: nn.Module, name: str) -> None:
    """Allocate this module's own parameters and buffers on the CPU and fill them. Parameters keep their identity."""
    if not is_deferred(module):
        return
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is None:
        raise UnsupportedModelError(
            f"module {name!r} ({type(module).__name__}) was built under deferred_init and has no reset_parameters() to "
            "fill it. Give it one that sets its own parameters and buffers, or build the model outside deferred_init."
        )
    for parameter in module.parameters(recurse=False):
        if parameter.is_meta:
            real = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
            # An optimizer may hold the parameter already: the object stays, what it points to changes.
            torch.utils.swap_tensors(parameter, real)
    for key, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta:
            module._buffers[key] = torch.empty_like(buffer, device="cpu")
    with torch.no_grad():
        reset()
