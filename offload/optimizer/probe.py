"""How an optimizer without a kernel may be run: found by training clones of the model's parameters with it.

Owns: the comparison of torch's way with a session's, and the reasons for which an optimizer is refused.
Does not: step parameters of the model (torch_step.py).
Threads: the training thread, at the start.

Note [Trial]: clones of the parameters are trained twice: as torch does, all at once by an optimizer that keeps what it
likes; and as a session does, each by itself, with the options and attributes of an optimizer that steps without
gradients. Only an optimizer that gives the same bits, and leaves the same values in options and attributes, is run. In
the last step some clones have no gradient. Clones have the shapes of the model's parameters: large ones are reduced,
but stay above the sizes (a few thousand elements) and keep the divisors (up to 256) from which other packages take
other forms of state.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import FunctionType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from offload.errors import UnsupportedOptimizerError
from offload.optimizer.torch_step import NOT_COPIED, Form, StandIn, StateForms, forms, groups_of, is_elementwise
from offload.storage.state_tensors import StateTensor

NUM_STEPS: Final = 3
"""The first, which makes state; one that goes on from that; one where not all parameters have a gradient."""

MOST_NUMEL: Final = 65_536
"""Of one clone."""

MOST_TOTAL_NUMEL: Final = 4_194_304
"""Of all clones, as long as none falls under LEAST_NUMEL."""

LEAST_NUMEL: Final = 16_384
"""Well above the size (4,096) from which optimizers quantize their state."""

KEPT_DIVISOR: Final = 256
"""Blocks of quantized state have so many elements."""

LARGEST_KERNEL: Final = 16
"""Lengths of no more, as of kernels of convolutions, stay as they are."""

MOST_DEPTH: Final = 8
"""How deep attributes are searched for parameters: a list of (module, name) pairs in an object has five levels."""

SWITCHES: Final = frozenset({"train", "eval"})
"""Methods of optimizers that train other weights than they evaluate."""

REMEDY: Final = "use torch.optim.AdamW or another that steps each parameter for itself"


@dataclass(slots=True)
class _Clone:
    """Stands for the parameters of one group and shape."""

    group: int
    shape: tuple[int, ...]
    factor: float
    """Elements of all that it stands for, for each of its own."""
    plain: nn.Parameter
    """Trained as torch does."""
    ours: nn.Parameter
    """Trained as a session does."""
    gradients: list[Tensor | None]
    states: list[dict[str, Any]] = field(default_factory=list)
    """After each step."""


def probe(optimizer: torch.optim.Optimizer) -> StateForms:
    """Forms of the state that this optimizer keeps. Raises UnsupportedOptimizerError where weights would differ.

    Draws none of the user's random numbers and changes nothing of the user's optimizer.
    """
    name = type(optimizer).__name__
    if any(vars(cls).keys() >= SWITCHES for cls in type(optimizer).__mro__):
        raise UnsupportedOptimizerError(
            f"optimizer {name} swaps weights in train() and eval(), where it has not the state that the session keeps; "
            f"{REMEDY}."
        )
    _check_shared_state(name, optimizer.state, _members(optimizer))
    _check_attributes(optimizer)
    clones = _clones(optimizer)
    with torch.random.fork_rng(devices=[]):
        _Trial(optimizer, clones).run()
    return _state_forms(clones, len(optimizer.param_groups))


def _members(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# --------------------------------------------------------------------------------------------------- clones


def _clones(optimizer: torch.optim.Optimizer) -> list[_Clone]:
    """One for each group and shape; one more in groups that have several parameters of one shape."""
    flatten = is_elementwise(optimizer)
    numels: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            shape = (parameter.numel(),) if flatten else tuple(parameter.shape)
            numels[index, shape].append(parameter.numel())
    most_numel = min(MOST_NUMEL, max(LEAST_NUMEL, MOST_TOTAL_NUMEL // max(1, len(numels))))
    by_reduced: dict[tuple[int, tuple[int, ...]], list[int]] = defaultdict(list)
    for (index, shape), of_shape in numels.items():
        by_reduced[index, reduced(shape, most_numel)] += of_shape
    generator = torch.Generator().manual_seed(0)
    clones: list[_Clone] = []
    for (index, shape), of_shape in by_reduced.items():
        factor = sum(of_shape) / max(1, math.prod(shape))
        clones.append(_clone(index, shape, factor, generator, len(clones)))
        if len(of_shape) > 1 and (not clones[:-1] or clones[-2].group != index):
            clones.append(_clone(index, shape, 0.0, generator, len(clones)))
    return clones


def _clone(group: int, shape: tuple[int, ...], factor: float, generator: torch.Generator, number: int) -> _Clone:
    values = torch.randn(shape, generator=generator)
    gradients: list[Tensor | None] = [
        torch.randn(shape, generator=generator).mul_(0.1 * (1 + number % 3)) for _ in range(NUM_STEPS)
    ]
    if number % 2:
        gradients[-1] = None
    return _Clone(group, shape, factor, nn.Parameter(values.clone()), nn.Parameter(values), gradients)


def reduced(shape: tuple[int, ...], most_numel: int) -> tuple[int, ...]:
    """A shape of the same rank with at most so many elements; see Note [Trial]."""
    lengths = list(shape)
    while math.prod(lengths) > most_numel:
        shorter = [max(d, (n // 2) // d * d) for n in lengths for d in [math.gcd(n, KEPT_DIVISOR)]]
        able = [i for i, n in enumerate(lengths) if shorter[i] < n and n > LARGEST_KERNEL]
        axis = max(able or range(len(lengths)), key=lengths.__getitem__)
        lengths[axis] = shorter[axis] if able else (lengths[axis] + 1) // 2
    return tuple(lengths)


# ---------------------------------------------------------------------------------------------------- trial


class _Trial:
    """Both ways, side by side."""

    def __init__(self, optimizer: torch.optim.Optimizer, clones: Sequence[_Clone]) -> None:
        self._kind = type(optimizer)
        self._name = self._kind.__name__
        self._clones = clones
        self._plain = _copied(optimizer, [[c.plain for c in clones if c.group == i] for i in _groups(optimizer)])
        self._without = _copied(optimizer, [[c.ours for c in clones if c.group == i] for i in _groups(optimizer)])
        """In the place of the user's optimizer in a session: steps without gradients."""
        self._stand_in = StandIn(self._kind)

    def run(self) -> None:
        """Raises UnsupportedOptimizerError at the first difference."""
        for number in range(NUM_STEPS):
            for clone in self._clones:
                clone.plain.grad = _copy(clone.gradients[number])
            before = torch.get_rng_state()
            self._attempt("its own step fails on tensors of the host", lambda: self._kind.step(self._plain))
            if not torch.equal(before, torch.get_rng_state()):
                self._refuse("draws random numbers in its step, and a session steps parameters in another order")
            # Copied: what steps leave in an attribute's list reaches nobody in order, as they run on a lane.
            attributes = _copied_values(groups_of(self._without)[0].attributes)
            groups = [replace(group, attributes=attributes) for group in groups_of(self._without)]
            for clone in self._clones:
                self._step_alone(clone, number, groups)
            before_without = [clone.ours.detach().clone() for clone in self._clones]
            self._attempt(
                "its own step does not work where no parameter has a gradient, as in a session",
                lambda: self._kind.step(self._without),
            )
            self._compare(before_without)

    def _step_alone(self, clone: _Clone, number: int, groups: Any) -> None:
        gradient = clone.gradients[number]
        if gradient is None:
            clone.states.append(clone.states[-1])
            return
        parameter = nn.Parameter(clone.ours.detach().clone())
        parameter.grad = gradient.clone()
        state = _copied_values(clone.states[-1]) if clone.states else {}
        found: list[dict[str, Any]] = []
        self._attempt(
            "its own step does not work on one parameter by itself",
            lambda: found.append(self._stand_in.step(parameter, groups, clone.group, state)),
        )
        # As a session keeps it, nothing in the state shares memory with the parameter or its gradient.
        clone.states.append(_copied_values(found[0]))
        clone.ours.data.copy_(parameter.detach())

    def _compare(self, before_without: Sequence[Tensor]) -> None:
        _check_shared_state(self._name, self._plain.state, [clone.plain for clone in self._clones])
        if differ := _differing(surroundings(self._plain), surroundings(self._without)):
            self._refuse(
                f"keeps what it has seen of gradients in {', '.join(differ)}, of its own or of a group, but a session "
                "steps each parameter by itself; keep it in the state of each parameter"
            )
        for clone, before in zip(self._clones, before_without, strict=True):
            if not _same_bits(clone.ours, before):
                self._refuse("changes parameters that have no gradient, which a session does not step")
            if not _same_bits(clone.ours, clone.plain):
                self._refuse(
                    "steps a parameter otherwise where another one has a gradient, too, but a session steps each by "
                    f"itself (seen at the shape {clone.shape}); {REMEDY} (clip by max_grad_norm)"
                )

    def _attempt(self, what_fails: str, step: Callable[[], Any]) -> None:
        try:
            step()
        except Exception as error:
            raise UnsupportedOptimizerError(
                f"optimizer {self._name} has no kernel, and {what_fails} ({type(error).__name__}: {error}); {REMEDY}."
            ) from error

    def _refuse(self, why: str) -> None:
        raise UnsupportedOptimizerError(f"optimizer {self._name} {why}{'' if ';' in why else '; ' + REMEDY}.")


def _groups(optimizer: torch.optim.Optimizer) -> range:
    return range(len(optimizer.param_groups))


def _copied(optimizer: torch.optim.Optimizer, parameters: Sequence[Sequence[nn.Parameter]]) -> torch.optim.Optimizer:
    """An optimizer of the same class, options and attributes over other parameters, without state."""
    groups = groups_of(optimizer)
    made: torch.optim.Optimizer = object.__new__(type(optimizer))
    made.__dict__ = _copied_values(groups[0].attributes) | {
        "param_groups": [g.options | {"params": list(row)} for g, row in zip(groups, parameters, strict=True)],
        "state": defaultdict(dict),
    }
    return made


def _copied_value(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, a generator: what steps leave in it is compared by the weights
        return value


def _copied_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied_value(value) for name, value in values.items()}


def _copy(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.clone()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


# ----------------------------------------------------------------------------------- where else things are kept


def surroundings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Options of all groups, and attributes; without flags, whose few values the trial itself has seen."""
    values = {name: value for name, value in optimizer.__dict__.items() if _is_own(name)}
    for index, group in enumerate(optimizer.param_groups):
        values |= {f"{name} of group {index}": value for name, value in group.items() if name != "params"}
    return {name: value for name, value in values.items() if not isinstance(value, bool)}


def _is_own(name: str) -> bool:
    return name not in NOT_COPIED and not name.endswith("_hooks")


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def same(a: Any, b: Any) -> bool:
    """Equal as far as they consist of plain values and tensors; other objects are taken as equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.eq(a, b).logical_or(a.ne(a)).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, bool | int | float | complex | str):
        return a == b or (a != a and b != b)
    return True


def _check_shared_state(name: str, state: Mapping[Any, Any], parameters: Iterable[nn.Parameter]) -> None:
    known = {id(parameter) for parameter in parameters}
    shared = sorted(repr(key) for key in state if not isinstance(key, Tensor) and id(key) not in known)
    if shared:
        raise UnsupportedOptimizerError(
            f"optimizer {name} keeps state for all parameters together, as state[{'], state['.join(shared)}], but a "
            "session steps each parameter by itself; keep it in the state of each parameter, or in an option of the "
            "group that does not depend on gradients."
        )


def _check_attributes(optimizer: torch.optim.Optimizer) -> None:
    """Raise where an attribute leads to parameters: a session steps copies, about which it would know nothing."""
    known = {id(parameter) for parameter in _members(optimizer)}
    for name, value in optimizer.__dict__.items():
        if _is_own(name) and _leads_to(value, known, {id(optimizer), id(optimizer.param_groups)}, MOST_DEPTH):
            raise UnsupportedOptimizerError(
                f"optimizer {type(optimizer).__name__} knows parameters of the model by its attribute {name!r} (an "
                "optimizer inside, or settings of single parameters), but a session steps copies of them; pass the "
                f"optimizer inside, give settings by groups, or {REMEDY}."
            )


def _leads_to(value: Any, known: set[int], seen: set[int], depth: int) -> bool:
    if id(value) in known:
        return True
    if isinstance(value, int) and value in known:  # a table by id()
        return True
    if depth == 0 or id(value) in seen or isinstance(value, Tensor | str | bytes | type | FunctionType | ModuleType):
        return False
    seen.add(id(value))
    return any(_leads_to(each, known, seen, depth - 1) for each in _held(value))


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    else:
        try:
            yield from vars(value).values()
        except TypeError:  # it has no attributes
            return


# ---------------------------------------------------------------------------------------------------- forms


def _state_forms(clones: Sequence[_Clone], num_groups: int) -> StateForms:
    """What is streamed, by group; and what the rest takes.

    Streamed is a key that is a plain fp32 tensor of the parameter's shape wherever it is at all, from the first step
    on, in all parameters of a group or in none.
    """
    rows = [[(clone, forms(state)) for state in clone.states] for clone in clones]
    all_forms = [pair for row in rows for pair in row]
    keys = list(dict.fromkeys(key for _, of_state in all_forms for key in of_state))
    fits = [key for key in keys if all(f.get(key, _form(c)) == _form(c) for c, f in all_forms)]
    streamed: list[set[str]] = [set() for _ in range(num_groups)]
    names: list[str] = []
    for key in fits:
        counts: dict[int, set[bool]] = defaultdict(set)
        for clone, of_state in all_forms:
            counts[clone.group].add(key in of_state)
        if all(len(kinds) == 1 for kinds in counts.values()):
            names.append(key)
            for group, kinds in counts.items():
                if True in kinds:
                    streamed[group].add(key)
    late = {
        key for row in rows for (_, a), (_, b) in pairwise(row) for key in a.keys() | b.keys()
        if a.get(key) != b.get(key)
    }  # fmt: skip
    small_bytes = sum(
        clone.factor * sum(num_bytes(value) for key, value in clone.states[-1].items() if key not in names)
        for clone in clones
    )
    return StateForms(
        tuple(StateTensor(name, torch.float32) for name in names),
        tuple(frozenset(row) for row in streamed),
        frozenset(late),
        math.ceil(small_bytes),
    )


def _form(clone: _Clone) -> Form:
    return Form(Tensor, torch.float32, clone.shape)


def num_bytes(value: Any) -> int:
    """Bytes of the tensors that a value of state holds."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, str | bytes | type | FunctionType | ModuleType):
        return 0
    return sum(num_bytes(each) for each in _held(value))
