"""Partitions: which parameters are fetched together, and where each one lies in its flat parameter.

Owns: cutting a model into partitions, the layout of flat parameters, shards and chunks, the versions of partitions.
Does not: hold weights (weights/) or decide homes (planning/).
Threads: made once; `version` is raised by the training thread alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import torch
from torch import nn

from offload.units import BLOCK_NUMEL, PARAMETER_ALIGN_BYTES, round_up

BLOCK_LIST_SHARE: Final = 0.1
"""A module list whose children hold this share of the parameters is a list of blocks."""

MAX_PARTITION_BYTES: Final = 1 << 30
"""A block larger than this is cut at the module lists inside it."""

JOIN_BELOW_NUMEL: Final = 65_536
"""Modules outside blocks with fewer elements than this share one partition per parent."""

READ_THEIR_CHILDREN: Final = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch whose forward uses weights of its children without calling them: blocks, wherever they are."""

NEVER_CALLED: Final = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules without a forward: what they own is used by the module that holds them."""


@dataclass(slots=True, eq=False)
class Entry:
    """One parameter in a flat parameter."""

    name: str
    """Qualified name in the model (of the first module that owns it)."""
    parameter: nn.Parameter
    shape: torch.Size
    numel: int
    start: int
    """First element in the flat parameter."""
    original_dtype: torch.dtype
    original_device: torch.device
    original_class: type[nn.Parameter]
    """A subclass of torch's own, perhaps: it is restored exactly."""
    group: int | None
    """Index of its optimizer group; None where frozen."""
    index: int
    """Position among the trainable parameters of the model, -1 where frozen."""

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.numel


@dataclass(slots=True, eq=False)
class FlatParameter:
    """A contiguous run of a partition's parameters of one trainability."""

    entries: list[Entry]
    trainable: bool
    numel: int
    """Elements with padding; a multiple of world size x alignment."""

    def shard(self, rank: int, world_size: int) -> tuple[int, int]:
        """Elements [start, stop) of one rank."""
        length = self.numel // world_size
        return rank * length, (rank + 1) * length

    def chunks(self, chunk_numel: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        """Elements [start, stop) of the flat parameter: the chunks of one rank's shard."""
        start, stop = self.shard(rank, world_size)
        return [(at, min(at + chunk_numel, stop)) for at in range(start, stop, chunk_numel)]


@dataclass(slots=True, eq=False)
class Partition:
    """Parameters that are fetched together."""

    id: int
    name: str
    trainable: FlatParameter
    frozen: FlatParameter
    modules: list[nn.Module]
    """Modules whose pre-forward acquires it: the block, and every module that directly owns one of its parameters."""
    held_with: tuple[int, ...] = ()
    """Partitions acquired at the same time, because their modules enclose this one's."""
    version: int = 0
    """Raised by every `step()` that covers it."""
    build_bytes: int = 0
    """Largest transient of building one of its modules, in its original dtype."""
    flat_parameters: tuple[FlatParameter, FlatParameter] = field(init=False)

    def __post_init__(self) -> None:
        self.flat_parameters = (self.trainable, self.frozen)

    def entries(self) -> Iterator[Entry]:
        """All its parameters, trainable first."""
        for flat in self.flat_parameters:
            yield from flat.entries


@dataclass(slots=True, eq=False)
class _Draft:
    name: str
    modules: list[nn.Module]
    parameters: dict[nn.Parameter, str]


def partition_model(
    model: nn.Module,
    group_of: Mapping[nn.Parameter, int],
    *,
    itemsize: int,
    align_numel: int = 1,
    world_size: int = 1,
) -> list[Partition]:
    """Cut a model into partitions (design: one per block, one per other owner of parameters, small ones joined).

    `group_of`: optimizer group by parameter; a parameter that is not in it, or needs no gradient, is frozen.
    `itemsize`: bytes per element of the working dtype. `align_numel`: parameters start at multiples of this, too.
    Order is that of the model's modules.
    """
    drafts = _drafts(model, itemsize)
    align = math.lcm(PARAMETER_ALIGN_BYTES // itemsize, align_numel)
    trainable_index = 0
    partitions: list[Partition] = []
    for draft in drafts:
        trainable = [p for p in draft.parameters if p.requires_grad and p in group_of]
        trainable.sort(key=lambda p: group_of[p])  # stable: model order inside a group
        chosen = set(trainable)
        frozen = [p for p in draft.parameters if p not in chosen]
        flat_parameters = []
        for parameters, is_trainable in ((trainable, True), (frozen, False)):
            flat = _layout(draft, parameters, group_of, is_trainable, align, world_size)
            for entry in flat.entries if is_trainable else ():
                entry.index = trainable_index
                trainable_index += 1
            flat_parameters.append(flat)
        partitions.append(Partition(len(partitions), draft.name, flat_parameters[0], flat_parameters[1], draft.modules))
    _find_enclosing(model, partitions)
    for partition in partitions:
        partition.build_bytes = max(map(_own_bytes, partition.modules), default=0)
    return partitions


def _own_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def _layout(
    draft: _Draft,
    parameters: Sequence[nn.Parameter],
    group_of: Mapping[nn.Parameter, int],
    trainable: bool,
    align: int,
    world_size: int,
) -> FlatParameter:
    entries, start = [], 0
    for parameter in parameters:
        start = round_up(start, align)
        entries.append(
            Entry(
                name=draft.parameters[parameter],
                parameter=parameter,
                shape=parameter.shape,
                numel=parameter.numel(),
                start=start,
                original_dtype=parameter.dtype,
                original_device=parameter.device,
                original_class=type(parameter),
                group=group_of[parameter] if trainable else None,
                index=-1,
            )
        )
        start += parameter.numel()
    return FlatParameter(entries, trainable, round_up(start, align * world_size))


def _drafts(model: nn.Module, itemsize: int) -> list[_Draft]:
    """Partitions in module order; every floating parameter is in exactly one, the first owner's."""
    names = {module: name for name, module in model.named_modules()}
    owned: set[nn.Parameter] = set()
    drafts: list[_Draft] = []
    joined: dict[nn.Module | None, _Draft] = {}
    blocks = _blocks(model, itemsize)
    inside = {module for block in blocks for module in block.modules()}
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        called = module
        while isinstance(called, NEVER_CALLED) and called in parents:
            called = parents[called]
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(called)

    def claim(draft: _Draft, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in owned and parameter.is_floating_point():
                owned.add(parameter)
                draft.parameters[parameter] = f"{names[module]}.{name}".lstrip(".")

    for module in model.modules():
        if module in blocks:
            draft = _Draft(names[module], [module], {})
            for child in module.modules():
                claim(draft, child)
        elif module in inside:
            continue
        else:
            own = sum(p.numel() for p in module.parameters(recurse=False) if p not in owned)
            if not own:
                continue
            parent = parents.get(module)
            fresh = _Draft(names[module] or type(model).__name__, [], {})
            # A module with children encloses others: joined to a sibling, that sibling would be held as long.
            encloses = isinstance(module, NEVER_CALLED) or any(True for _ in module.children())
            small = own < JOIN_BELOW_NUMEL and not encloses
            draft = joined.get(parent, fresh) if small else fresh
            if small:
                joined[parent] = draft
            claim(draft, module)
        if draft.parameters and draft not in drafts:
            drafts.append(draft)
    for draft in drafts:
        for parameter in draft.parameters:
            draft.modules.extend(owner for owner in owners[parameter] if owner not in draft.modules)
    return drafts


def _blocks(model: nn.Module, itemsize: int) -> dict[nn.Module, None]:
    """Children of the outermost module lists that hold a tenth of the parameters; large ones cut again."""
    if isinstance(model, READ_THEIR_CHILDREN):
        return {model: None}
    total = sum(p.numel() for p in model.parameters())
    blocks: dict[nn.Module, None] = {}

    def walk(module: nn.Module) -> None:
        for child in module.children():
            numel = sum(p.numel() for p in child.parameters())
            if isinstance(child, READ_THEIR_CHILDREN):
                blocks[child] = None
            elif isinstance(child, nn.ModuleList | nn.Sequential) and numel >= BLOCK_LIST_SHARE * total > 0:
                add_blocks(child)
            else:
                walk(child)

    def add_blocks(blocks_list: nn.Module) -> None:
        for block in blocks_list.children():
            if isinstance(block, nn.ModuleList | nn.Sequential) and _is_container(block):
                add_blocks(block)
                continue
            num_bytes = sum(p.numel() for p in block.parameters()) * itemsize
            if num_bytes > MAX_PARTITION_BYTES and any(isinstance(m, nn.ModuleList) for m in block.modules()):
                walk(block)
            else:
                blocks[block] = None

    if isinstance(model, nn.Sequential):
        add_blocks(model)
    else:
        walk(model)
    return blocks


def _is_container(module: nn.Module) -> bool:
    """A module list is never called itself: it cannot be a block."""
    return isinstance(module, nn.ModuleList)


def _find_enclosing(model: nn.Module, partitions: Sequence[Partition]) -> None:
    """Fill `held_with`: a partition is acquired while every partition of its modules' ancestors is."""
    partitions_of: dict[nn.Module, set[int]] = {}
    for partition in partitions:
        for module in partition.modules:
            partitions_of.setdefault(module, set()).add(partition.id)
    held: list[set[int]] = [set() for _ in partitions]

    def walk(module: nn.Module, above: frozenset[int], path: frozenset[nn.Module]) -> None:
        if module in path:
            return
        here = above | partitions_of.get(module, set())
        for pid in partitions_of.get(module, ()):
            held[pid] |= here - {pid}
        for child in module.children():
            walk(child, here, path | {module})

    walk(model, frozenset(), frozenset())
    for partition in partitions:
        partition.held_with = tuple(sorted(held[partition.id]))


def block_segments(start: int, stop: int) -> list[tuple[int, int]]:
    """[start, stop) cut at multiples of BLOCK_NUMEL: the terms of the norm, whatever the size of chunks."""
    borders = [start, *range(round_up(start + 1, BLOCK_NUMEL), stop, BLOCK_NUMEL), stop]
    return [(a, b) for a, b in pairwise(borders) if a < b]
