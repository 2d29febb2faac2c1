"""Tensors anywhere in what modules take and return.

Owns: which structures are looked into: dicts, lists, tuples and dataclasses.
Does not: know what the tensors are for (hooks.py).
Threads: pure.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors anywhere in dicts, sequences and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_in(v)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for f in dataclasses.fields(value) for t in tensors_in(getattr(value, f.name, None))]
    return []


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with `change` applied to every tensor; the very object where nothing changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        new = [mapped(v, change) for v in value]
        if all(a is b for a, b in zip(new, value, strict=True)):
            return value
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    if type(value) is dict:
        return {k: mapped(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and not isinstance(value, dict):
        changes = {}
        for member in dataclasses.fields(value):
            before = getattr(value, member.name, None)
            after = mapped(before, change)
            if after is not before and member.init:
                changes[member.name] = after
        return dataclasses.replace(value, **changes) if changes else value
    return value
