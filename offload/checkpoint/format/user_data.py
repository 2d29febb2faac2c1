"""The user's dictionary, schedulers and random states as JSON and tensors. Nothing is pickled.

Owns: which values can be saved, how they are written as JSON, and the way back.
Does not: store the tensors (writer.py).
Threads: any.

JSON has no tuples, no keys but strings, no NaN and no tensors: each of these is an object with one key that starts
with "$". A user's own dictionary with such a key is written as pairs, so nothing can be mistaken.
"""

import math
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from offload.checkpoint.format.dtypes import NAME_OF
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError, shown

TENSOR, ARRAY, TUPLE, FLOAT, PAIRS = "$tensor", "$array", "$tuple", "$float", "$pairs"
MAX_DEPTH: Final = 64
MAX_INT_BITS: Final = 8192
"""Python refuses to read longer ones from text."""

_FLOATS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MAPPINGS: Final[dict[type, str]] = {dict: "dict", Counter: "Counter", OrderedDict: "OrderedDict"}
_MAKE: Final[dict[str, Callable[[Any], Any]]] = {
    "dict": dict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "OrderedDict": OrderedDict,
}


def encode(value: Any, *, name: str) -> tuple[Any, list[Tensor]]:
    """JSON for a value, and the tensors it refers to by number.

    Takes None, bool, int, float, str, list, tuple, dict (also OrderedDict and Counter), tensors, numpy arrays and
    numbers. Anything else is refused with its path: `extra["scheduler"]["lambda"]`.
    """
    tensors: list[Tensor] = []
    return _encode(value, name, tensors, 0), tensors


def decode(coded: Any, tensors: Callable[[int], Tensor]) -> Any:
    """The value that was encoded; `tensors` gives those it refers to."""
    try:
        return _decode(coded, tensors, 0)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CorruptCheckpointError(f"the saved user data cannot be understood: {shown(error)}.") from error


def _encode(value: Any, path: str, tensors: list[Tensor], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path} is nested deeper than {MAX_DEPTH}: does it contain itself?")
    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        if value.bit_length() > MAX_INT_BITS:
            raise CheckpointError(
                f"{path} is an int of {value.bit_length()} bits; at most {MAX_INT_BITS} can be saved."
            )
        return value
    if isinstance(value, np.generic):  # times are no numbers, though some of them have an int as item
        return _encode_number(value.item() if value.dtype.kind in "biuf" else value, path)
    if type(value) is float:
        return _encode_number(value, path)
    if isinstance(value, Tensor | np.ndarray):
        return _encode_tensor(value, path, tensors)
    if type(value) is list:
        return [_encode(each, f"{path}[{i}]", tensors, depth + 1) for i, each in enumerate(value)]
    if type(value) is tuple:
        return {TUPLE: [_encode(each, f"{path}[{i}]", tensors, depth + 1) for i, each in enumerate(value)]}
    if type(value) in _MAPPINGS:
        return _encode_mapping(value, path, tensors, depth)
    raise CheckpointError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds None, bool, int, float, "
        "str, list, tuple, dict, tensors and numpy arrays. Save its state_dict() or its fields instead."
    )


def _encode_number(value: Any, path: str) -> Any:
    if type(value) is float and not math.isfinite(value):
        return {FLOAT: str(value)}
    if type(value) not in (bool, int, float):
        raise CheckpointError(f"{path} is a numpy number that is no bool, int or float; save it as one of these.")
    return value


def _encode_tensor(value: Any, path: str, tensors: list[Tensor]) -> Any:
    tag = TENSOR
    if type(value) is np.ndarray:
        tag = ARRAY
        try:
            value = torch.from_numpy(np.array(value, order="C"))  # a copy: negative strides, foreign memory
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is an array of {value.dtype}, which a checkpoint cannot hold.") from error
    # `type` and not isinstance: a subclass would come back as a plain tensor, without what makes it one
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
        raise CheckpointError(f"{path} is a {type(value).__qualname__}; save a plain, dense tensor or array.")
    if value.is_meta or value.dtype not in NAME_OF:
        raise CheckpointError(f"{path} is a tensor of {value.dtype} on {value.device}, which cannot be saved.")
    tensors.append(value.detach())
    return {tag: len(tensors) - 1}


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: list[Tensor], depth: int) -> Any:
    for key in value:
        if key is not None and type(key) not in (bool, int, str):
            raise CheckpointError(f"{path} has the key {key!r}; keys are str, int, bool or None.")
    coded = {key: _encode(each, f"{path}[{key!r}]", tensors, depth + 1) for key, each in value.items()}
    if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return coded
    return {PAIRS: [_MAPPINGS[type(value)], [[key, each] for key, each in coded.items()]]}


def _decode(coded: Any, tensors: Callable[[int], Tensor], depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:
        raise ValueError("it is nested too deep")
    if isinstance(coded, list):
        return [_decode(each, tensors, depth + 1) for each in coded]
    if not isinstance(coded, dict):
        return coded
    tag = next((key for key in coded if key.startswith("$")), None)
    if tag is None:
        return {key: _decode(each, tensors, depth + 1) for key, each in coded.items()}
    if len(coded) > 1:
        raise ValueError(f"{tag} does not stand alone")
    held = coded[tag]
    if tag == FLOAT:
        return _FLOATS[held]
    if tag == TUPLE:
        return tuple(_decode(each, tensors, depth + 1) for each in held)
    if tag == PAIRS:
        kind, pairs = held
        return _MAKE[kind]([(key, _decode(each, tensors, depth + 1)) for key, each in pairs])
    if tag in (TENSOR, ARRAY) and type(held) is int:
        return tensors(held) if tag == TENSOR else tensors(held).numpy()
    raise ValueError(f"{tag} of {held!r:.80} has no meaning")


# ----------------------------------------------------------------------------------------------------- random


def random_states(*, devices: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators; `devices`: those of accelerators by name."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "devices": dict(devices or {}),
    }


def set_random_states(states: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take over what `random_states` gave; returns the states of accelerators, which the caller sets."""
    try:
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])
        torch.set_rng_state(states["torch"])
        return dict(states["devices"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the saved random states are none that these versions take: {shown(error)}.") from error
