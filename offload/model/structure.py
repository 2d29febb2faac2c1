"""Modules and parameters that appear in a model while it is offloaded.

Owns: the registration hooks of torch that see them.
Does not: take them into a session: they are in no plan, so they are refused where they are assigned.
Threads: the training thread.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from offload.errors import UnsupportedModelError

REMEDY = "Leave the context, change the model, give the new parameters to the optimizer, and call offload.enable again."


class StructureWatch:
    """Raises at the line that would change the structure of a model, before it has changed."""

    def __init__(self, model: nn.Module) -> None:
        self._names = WeakKeyDictionary({module: name for name, module in model.named_modules()})
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Register the hooks. They are global in torch, and look at the modules of this model alone."""
        self._handles.append(register_module_parameter_registration_hook(self._parameter))
        self._handles.append(register_module_module_registration_hook(self._module))

    def detach(self) -> None:
        """Remove them."""
        while self._handles:
            self._handles.pop().remove()

    def _parameter(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if module in self._names and parameter is not None and module._parameters.get(name) is not parameter:
            raise UnsupportedModelError(
                f"parameter {self._path(module, name)!r} was assigned while the model is offloaded: nothing would "
                f"fetch or step it. {REMEDY}"
            )

    def _module(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if module not in self._names or child is None or module._modules.get(name) is child:
            return
        if any(True for _ in child.parameters()):
            raise UnsupportedModelError(
                f"module {self._path(module, name)!r} ({type(child).__name__}) was assigned while the model is "
                f"offloaded: nothing would fetch or step its parameters. {REMEDY}"
            )

    def _path(self, module: nn.Module, name: str) -> str:
        return f"{self._names[module]}.{name}".lstrip(".")
