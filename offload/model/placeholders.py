"""Placeholders: what a parameter is while its weights are not on the device.

Owns: the class that such a parameter has meanwhile, and what every use of it outside its owner's forward does.
Does not: know where values are (`ParameterValues` reads and writes them), or when the class changes (weights/slots.py).
Threads: the training thread, and autograd's own in its place.

Note [Placeholder class]: a parameter that is not on the device is an instance of a subclass of its own class, made once
per session and class; to swap `__class__` costs a tenth of a microsecond. torch hands every function, method and
property that gets such a parameter to `__torch_function__` there. Shapes and hooks are true as they are; what needs
values gets a snapshot of the current ones, in the dtype that the parameter has for its user.

Note [Writes]: whether a function has written is seen from the snapshot's version counter, not from its name. What was
written goes to the parameter's homes before the function returns, so nothing is lost. Views of a snapshot (`p.data`,
`p.detach()[0]`, `p.T`) write through in the same way, until the optimizer steps: from then on the snapshot is history,
and a write to it raises.

Note [Reads with a gradient]: such a read is a node of the graph that passes its gradient on to the parameter, as any
use does. Its values are a copy, which lives as long as the graph needs it.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partialmethod
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from offload.errors import ParameterWritten
from offload.model.weak import gone

TRUE_AS_IT_IS: Final = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "is_complex",
        "is_floating_point", "is_signed", "is_conj", "is_neg", "is_inference", "is_same_size", "is_set_to",
        "get_device", "data_ptr", "untyped_storage", "register_hook", "requires_grad_",
        "retain_grad", "__hash__", "__len__", "is_coalesced", "is_shared", "is_pinned", "dim_order", "grad", "backward",
        "is_tensor",
    }
)  # fmt: skip
"""Functions that need no values."""

IN_PLACE_OPERATORS: Final = frozenset(
    {f"__i{op}__" for op in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
)

VALUE_PROPERTIES: Final = frozenset({"data", "T", "H", "mT", "mH", "real", "imag"})
"""Properties that are views of the values; all others are true as they are, but for the dtype."""

REFUSED: Final = ("set_", "resize_", "resize_as_", "share_memory_")
"""What would give the parameter other memory."""


class ParameterValues(Protocol):
    """Reads and writes the values of a session's parameters, wherever they are."""

    def dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """What the user sees now: the working dtype while the model runs, else that of before the session."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """A new tensor with the current values, in `dtype_of`, on the parameter's device. Waits for the step."""

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """New values, of the parameter's shape, into its homes."""

    def version(self, parameter: nn.Parameter) -> int:
        """Raised by every step that covers the parameter, and by every write."""

    def name(self, parameter: nn.Parameter) -> str:
        """For messages."""

    def hook_registered(self, parameter: nn.Parameter) -> None:
        """The user has registered a hook that runs when the gradient is there."""

    def begin_backward(self) -> None:
        """A backward passes a read: gradients are about to arrive. Called once for each."""

    @property
    def is_suspended(self) -> bool:
        """Nobody wants values now: uses of placeholders see them as they are."""


class Placeholder:
    """What all placeholder classes have in common: `isinstance` tells them."""


class PlaceholderTypes:
    """The placeholder classes of one session, by the class that they stand in for."""

    def __init__(self, values: ParameterValues) -> None:
        # Parameters are held by optimizers and graphs, which must not hold the session: Note [Who owns whom], weak.py.
        self._values = weakref.proxy(values)
        self._made: dict[type, type[nn.Parameter]] = {}

    def of(self, original: type[nn.Parameter]) -> type[nn.Parameter]:
        """The class that stands in for `original`."""
        made = self._made.get(original)
        if made is None:
            made = self._made[original] = _make_type(original, self._values)
        return made


def _make_type(original: type[nn.Parameter], values: ParameterValues) -> type[nn.Parameter]:
    class Standing(original, Placeholder):  # type: ignore[misc, valid-type]
        __doc__ = f"A {original.__name__} whose weights are not on the device."

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            try:
                return _call(cls, values, func, args, kwargs or {})
            except ReferenceError as error:
                raise gone() from error

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            if id(self) not in memo:
                memo[id(self)] = original(values.read(self), self.requires_grad)
            return memo[id(self)]

        def __reduce_ex__(self, protocol: Any) -> Any:
            return original(values.read(self), self.requires_grad).__reduce_ex__(protocol)

        def __hash__(self) -> int:
            return id(self)

        def __repr__(self, *, tensor_contents: Any = None) -> str:
            return "Parameter containing:\n" + repr(values.read(self).requires_grad_(self.requires_grad))

    # Optimizers and loops ask for `grad` several times a step: not through `__torch_function__`, a fifth of the time.
    Standing.grad = property(_get_grad, _set_grad, _GRAD.__delete__)
    for name in REFUSED:
        setattr(Standing, name, partialmethod(_refuse, values, name))
    Standing.__name__ = Standing.__qualname__ = f"Placeholder[{original.__name__}]"
    return Standing


_GRAD: Final[Any] = torch.Tensor.grad


def _get_grad(parameter: Tensor) -> Tensor | None:
    with torch._C.DisableTorchFunctionSubclass():
        gradient: Tensor | None = _GRAD.__get__(parameter)
    return gradient


def _set_grad(parameter: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        with torch._C.DisableTorchFunctionSubclass():
            _GRAD.__set__(parameter, None)
    else:
        _GRAD.__set__(parameter, gradient)  # in the dtype that the parameter has now: `_call`


# ---------------------------------------------------------------------------------------------------- one call


def _call(
    placeholder: type, values: ParameterValues, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """What `func` does to parameters of the class `placeholder`."""
    name, property_name = _names(func)
    if values.is_suspended:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if property_name == "dtype" and isinstance(args[0], placeholder):
        return values.dtype_of(args[0])  # type: ignore[arg-type]
    if property_name == "data" and name == "__set__":
        return _set_data(values, args[0], args[1])
    if property_name == "grad" and name == "__set__" and isinstance(args[1], Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return func(args[0], _as_gradient(args[0], args[1]))
    if name == "register_post_accumulate_grad_hook":
        with torch._C.DisableTorchFunctionSubclass():
            handle = func(*args, **kwargs)
            values.hook_registered(args[0])
        return handle
    if name in TRUE_AS_IT_IS or (property_name and property_name not in VALUE_PROPERTIES):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    reading = _Reading(
        placeholder, values, tracked=torch.is_grad_enabled() and property_name != "data" and name != "detach"
    )
    if args and _writes_in_place(name):
        reading.check_leaves(name, args[0])
    new_args, new_kwargs = reading.replaced(args), reading.replaced(dict(kwargs))
    # Detached it shares the version counter, which a tensor's `data` does not.
    result = new_args[0].detach() if property_name == "data" else func(*new_args, **new_kwargs)
    reading.write_back(name)
    return reading.outside(result)


class _Reading:
    """The snapshots that one call works on."""

    def __init__(self, placeholder: type, values: ParameterValues, *, tracked: bool) -> None:
        """`tracked`: autograd records the call."""
        self._placeholder = placeholder
        self._tracked = tracked
        self._values = values
        self._sources: dict[int, Source] = {}
        self._given: dict[int, Tensor] = {}
        """What the function gets for each parameter, by the parameter's id."""

    def check_leaves(self, name: str, target: Any) -> None:
        """Raise as torch does where autograd would record a write to a parameter."""
        for leaf in target if isinstance(target, list | tuple) else (target,):
            if (
                self._tracked
                and isinstance(leaf, Tensor)
                and isinstance(leaf, self._placeholder)
                and _requires_grad(leaf)
            ):
                raise RuntimeError(
                    "a leaf Variable that requires grad is being used in an in-place operation: parameter "
                    f"{self._values.name(leaf)!r} by {name}. Write inside torch.no_grad()."  # type: ignore[arg-type]
                )

    def replaced(self, value: Any) -> Any:
        """The same structure with a snapshot in the place of every placeholder."""
        if isinstance(value, self._placeholder):
            return self._snapshot(value)  # type: ignore[arg-type]
        if isinstance(value, list | tuple):
            new = [self.replaced(v) for v in value]
            return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
        if type(value) is dict:
            return {k: self.replaced(v) for k, v in value.items()}
        return value

    def _snapshot(self, parameter: nn.Parameter) -> Tensor:
        given = self._given.get(id(parameter))
        if given is None:
            source = self._sources[id(parameter)] = Source(self._values, parameter)
            given = source.whole
            if self._tracked and _requires_grad(parameter):
                given = _Read.apply(parameter, source)  # type: ignore[no-untyped-call]
            self._given[id(parameter)] = given
        return given

    def write_back(self, name: str) -> None:
        """What the function has written to a snapshot goes to the parameter."""
        for key, source in self._sources.items():
            if not self._given[key].requires_grad:
                source.write_through(name)

    def outside(self, result: Any) -> Any:
        """What the caller gets: parameters for snapshots of them, and views of snapshots that write through."""
        if isinstance(result, Tensor):
            for key, source in self._sources.items():
                given = self._given[key]
                if result is given and not given.requires_grad:
                    return source.parameter
                if not given.requires_grad and _shares_memory(result, given):
                    return source.view(result)
            return result
        if isinstance(result, list | tuple) and any(isinstance(r, Tensor) for r in result):
            new = [self.outside(r) for r in result]
            return type(result)(*new) if hasattr(result, "_fields") else type(result)(new)
        if isinstance(result, np.ndarray):
            result.setflags(write=False)  # what is written there would reach no parameter
        return result


class Source:
    """The current values of one parameter, as they were read, and the way back."""

    def __init__(self, values: ParameterValues, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.whole = values.read(parameter)
        self.version_read = self.whole._version
        self.values = values
        self._parameter_version = values.version(parameter)

    def write_through(self, name: str) -> None:
        """Write the whole to the homes where something has changed it. Raises where a step has come meanwhile."""
        if self.whole._version == self.version_read:
            return
        if self.values.version(self.parameter) != self._parameter_version:
            raise ParameterWritten(
                f"{name} wrote to a tensor that was read from parameter {self.values.name(self.parameter)!r} before "
                "its latest step or write: the write would undo that. Read the parameter again (p.data, p.detach())."
            )
        self.values.write(self.parameter, self.whole)
        self.version_read = self.whole._version
        self._parameter_version = self.values.version(self.parameter)

    def view(self, tensor: Tensor) -> Tensor:
        """`tensor`, which shares the memory of the whole, as one that writes through."""
        view = tensor.as_subclass(Snapshot)
        view.source = self
        return view


class Snapshot(Tensor):
    """Values read from a parameter. In-place changes are written through to it, until it is stepped."""

    source: Source

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, property_name = _names(func)
        if property_name == "data" and name == "__get__":
            return args[0].detach()  # shares the version counter, which a tensor's `data` does not
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        sources = {id(s): s for s in _sources_in((*args, *(kwargs or {}).values()))}
        for source in sources.values():
            source.write_through(name)
        return _wrapped(result, list(sources.values()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)


class _Read(torch.autograd.Function):
    """The values of a parameter as a node of the graph: its gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, source: Source) -> Tensor:
        ctx.values = source.values
        return source.whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.values.begin_backward()
        return gradient, None


def _names(func: Any) -> tuple[str, str]:
    """The name of a function, and of the property that it gets or sets."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__", "__delete__"):
        return name, getattr(func.__self__, "__name__", "")
    return name, ""


def _set_data(values: ParameterValues, parameter: Any, new: Tensor) -> None:
    if new.shape != parameter.shape:
        raise ParameterWritten(
            f"parameter {values.name(parameter)!r} of shape {tuple(parameter.shape)} was given data of shape "
            f"{tuple(new.shape)} while it is offloaded; leave the context to change its shape."
        )
    values.write(parameter, new.detach())


def _as_gradient(parameter: Any, gradient: Tensor) -> Tensor:
    """torch checks a gradient's dtype against that of the parameter as it is now: the working one."""
    if isinstance(gradient, Placeholder) or gradient.dtype == parameter.dtype or not gradient.is_floating_point():
        return gradient
    return gradient.to(parameter.dtype)


def _requires_grad(parameter: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.requires_grad


def _refuse(parameter: Any, values: ParameterValues, name: str, *_: Any) -> Any:
    raise ParameterWritten(
        f"{name} was called on parameter {values.name(parameter)!r} while its weights are offloaded: they are where "
        "the plan put them, in memory that the session manages. Leave the context first."
    )


def _writes_in_place(name: str) -> bool:
    """Whether a function changes its first argument, as its name tells."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE_OPERATORS


def _shares_memory(tensor: Tensor, whole: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.device != whole.device:
        return False
    return tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() and whole.numel() > 0


def _sources_in(value: Any) -> Iterator[Source]:
    if isinstance(value, Snapshot):
        yield value.source
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _sources_in(v)


def _wrapped(result: Any, sources: Sequence[Source]) -> Any:
    """Views of snapshots write through, too."""
    if isinstance(result, Tensor):
        if isinstance(result, Snapshot):
            return result
        source = next((s for s in sources if _shares_memory(result, s.whole)), None)
        return result if source is None or result.requires_grad else source.view(result)
    if isinstance(result, list | tuple) and any(isinstance(r, Tensor) for r in result):
        new = [_wrapped(r, sources) for r in result]
        return type(result)(*new) if hasattr(result, "_fields") else type(result)(new)
    if isinstance(result, np.ndarray):
        result.setflags(write=False)
    return result
