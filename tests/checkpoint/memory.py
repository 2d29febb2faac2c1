"""A model's state in plain tensors, as a source and a sink of checkpoints.

Cut as a session cuts: each item is shared between the ranks at borders of 256 entries, each share is walked in chunks,
and the state tensors of a chunk follow each other.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.checkpoint.format.load import Loaded, load
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.save import CheckpointJob, Extras, Saved
from offload.checkpoint.format.state import Item, Kind, Run, StateTensor
from offload.kernels.moments import decode_kernel, encode_kernel
from offload.kernels.split import join_kernel, split_kernel
from offload.memory.region import bits

BLOCK = 256

PLAIN = (StateTensor("master", torch.float32),)
SPLIT = (StateTensor("weights", torch.bfloat16), StateTensor("remainder", torch.uint16))
MOMENTS = {
    "fp32": tuple(StateTensor(name, torch.float32) for name in ("exp_avg", "exp_avg_sq")),
    "bf16": tuple(StateTensor(name, torch.bfloat16) for name in ("exp_avg", "exp_avg_sq")),
    "8bit": tuple(
        state_tensor
        for name in ("exp_avg", "exp_avg_sq")
        for state_tensor in (StateTensor(name, torch.uint8), StateTensor(f"{name}_scale", torch.float32, BLOCK))
    ),
}


@dataclass
class State:
    """Items and, for each of their state tensors, all entries."""

    items: list[Item]
    state_tensors: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def same_bits(self, other: "State") -> bool:
        return self.state_tensors.keys() == other.state_tensors.keys() and all(
            torch.equal(raw(values), raw(other.state_tensors[key])) for key, values in self.state_tensors.items()
        )


def raw(values: Tensor) -> Tensor:
    return values.reshape(-1).view(torch.uint8) if values.numel() else torch.empty(0, dtype=torch.uint8)


def trainable(name: str, shape: Sequence[int], *, split: bool = False, moments: str = "fp32", step: int = 3) -> Item:
    state_tensors = (*(SPLIT if split else PLAIN), *MOMENTS[moments])
    return Item(
        name=name,
        kind=Kind.TRAINABLE,
        shape=tuple(shape),
        dtype=torch.float32,
        state_tensors=state_tensors,
        step=step,
        aliases=(),
    )


def frozen(name: str, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> Item:
    state_tensors = (StateTensor("weights", dtype),)
    return Item(name=name, kind=Kind.FROZEN, shape=tuple(shape), dtype=torch.float32, state_tensors=state_tensors)


def buffer(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Item:
    return Item(
        name=name,
        kind=Kind.BUFFER,
        shape=tuple(shape),
        dtype=dtype,
        state_tensors=(StateTensor("weights", dtype),),
        step=0,
    )


def small_model(*, split: bool = False, moments: str = "fp32") -> list[Item]:
    """A few items of every kind; sizes cross blocks and leave tails."""
    return [
        replace(trainable("embed.weight", (37, 16), split=split, moments=moments), aliases=("head.weight",)),
        trainable("block.0.weight", (24, 24), split=split, moments=moments, step=7),
        trainable("block.0.bias", (1,), split=split, moments=moments),
        frozen("block.1.weight", (33, 9)),
        trainable("empty", (0, 4), split=split, moments=moments),
        buffer("running_mean", (5,)),
        buffer("num_batches", (), torch.int64),
    ]


def random_state(items: Sequence[Item], rng: np.random.Generator) -> State:
    """Masters of every size and sign, moments that an optimizer could have."""
    state = State(list(items))
    for item in items:
        numel = item.numel
        if item.kind is not Kind.TRAINABLE:
            state_tensor = item.state_tensors[0]
            values = torch.from_numpy(rng.integers(-100, 100, numel)).to(state_tensor.dtype)
            state.state_tensors[item.name, "weights"] = values
            continue
        master = torch.from_numpy(rng.standard_normal(numel).astype(np.float32) * np.float32(0.02))
        put_master(state, item, master)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = torch.from_numpy(rng.standard_normal(numel).astype(np.float32))
            put_moment(state, item, name, moment.abs() if name == "exp_avg_sq" else moment)
    return state


def put_master(state: State, item: Item, master: Tensor) -> None:
    """The master in the encoding of its item."""
    if not item.is_split:
        state.state_tensors[item.name, "master"] = master
        return
    weights, remainder = torch.empty(item.numel, dtype=torch.bfloat16), torch.empty(item.numel, dtype=torch.uint16)
    split_kernel()(bits(master), bits(weights), bits(remainder))
    state.state_tensors[item.name, "weights"], state.state_tensors[item.name, "remainder"] = weights, remainder


def put_moment(state: State, item: Item, name: str, moment: Tensor) -> None:
    """A moment in the encoding of its item."""
    state_tensor = item.state_tensor(name)
    if state_tensor.dtype is not torch.uint8:
        state.state_tensors[item.name, name] = moment.to(state_tensor.dtype)
        return
    codes = torch.empty(item.numel, dtype=torch.uint8)
    scales = torch.empty(-(-item.numel // BLOCK))
    encode_kernel("unsigned" if name == "exp_avg_sq" else "signed")(bits(moment), bits(codes), bits(scales))
    state.state_tensors[item.name, name], state.state_tensors[item.name, f"{name}_scale"] = codes, scales


def fp32_moment(state: State, item: Item, name: str) -> Tensor:
    """What a moment stands for."""
    held = state.state_tensors[item.name, name]
    if held.dtype is not torch.uint8:
        return held.float()
    decoded, scales = torch.empty(item.numel), state.state_tensors[item.name, f"{name}_scale"]
    decode_kernel("unsigned" if name == "exp_avg_sq" else "signed")(bits(held), bits(scales), bits(decoded))
    return decoded


def recoded(state: State, items: Sequence[Item], master: Mapping[str, Tensor]) -> State:
    """What a state is in other encodings, where its moments are fp32."""
    target = State(list(items))
    for item in items:
        if item.kind is not Kind.TRAINABLE:
            target.state_tensors[item.name, "weights"] = state.state_tensors[item.name, "weights"]
            continue
        put_master(target, item, master[item.name])
        for name in ("exp_avg", "exp_avg_sq"):
            put_moment(target, item, name, state.state_tensors[item.name, name])
    return target


def shared_runs(items: Sequence[Item], rank: int, world_size: int, chunk_numel: int = 2 * BLOCK) -> list[Run]:
    """One rank's runs: chunk by chunk, the state tensors of a chunk side by side. Buffers are rank 0's."""
    runs = []
    for item in items:
        if item.kind is Kind.BUFFER:
            runs += [Run(item.name, "weights", 0, item.numel)] if rank == 0 and item.numel else []
            continue
        share = -(-item.numel // (world_size * BLOCK)) * BLOCK
        stop = min((rank + 1) * share, item.numel)
        for start in range(rank * share, stop, chunk_numel):
            end = min(start + chunk_numel, stop)
            runs += [
                Run(item.name, p.name, start // p.block_numel, p.num_entries(end))
                for p in item.state_tensors
                if start < end
            ]
    return runs


class Source:
    """One rank's share of a state; the tensors it lends are overwritten as soon as the next is asked for."""

    def __init__(self, state: State, rank: int = 0, world_size: int = 1, chunk_numel: int = 2 * BLOCK) -> None:
        self._state = state
        self._runs = shared_runs(state.items, rank, world_size, chunk_numel)

    def items(self) -> list[Item]:
        return self._state.items

    def runs(self) -> list[Run]:
        return self._runs

    def values(self) -> Iterator[Tensor]:
        for run in self._runs:
            lent = self._state.state_tensors[run.item, run.state_tensor].reshape(-1)[run.start : run.stop].clone()
            yield lent
            raw(lent).fill_(0xA5)


class Sink:
    """Takes one rank's share; `state` is complete once all ranks have loaded into it."""

    def __init__(self, items: Sequence[Item], rank: int = 0, world_size: int = 1, chunk_numel: int = 2 * BLOCK) -> None:
        self._runs = shared_runs(items, rank, world_size, chunk_numel)
        if rank:
            self._runs += [Run(i.name, "weights", 0, i.numel) for i in items if i.kind is Kind.BUFFER and i.numel]
        self.state = State(list(items))
        self.steps: Mapping[str, int] | None = None
        self.num_writes = 0
        for item in items:
            for state_tensor in item.state_tensors:
                entries = torch.zeros(state_tensor.num_entries(item.numel), dtype=state_tensor.dtype)
                self.state.state_tensors[item.name, state_tensor.name] = entries

    def items(self) -> list[Item]:
        return self.state.items

    def runs(self) -> list[Run]:
        return self._runs

    def write(self, run: Run, values: Tensor) -> None:
        self.num_writes += 1
        self.state.state_tensors[run.item, run.state_tensor][run.start : run.stop] = values

    def finish(self, steps: Mapping[str, int]) -> None:
        self.steps = steps


def save(
    root: Path, state: State, *, extra: dict[str, Any] | None = None, rank_extra: dict[str, Any] | None = None,
    **options: Any,
) -> Saved:  # fmt: skip
    extras = Extras(extra or {}, rank_extra or {})
    return CheckpointJob(root, Source(state), **{"step": 3, "extras": extras, **options}).run()


def load_into(path: Path, items: Sequence[Item]) -> tuple[State, Loaded]:
    sink = Sink(items)
    with Checkpoint(path) as checkpoint:
        loaded = load(checkpoint, sink)
    return sink.state, loaded


def compile_kernels() -> None:
    """Done ahead of a measurement: the compiler needs more memory than what is measured."""
    master, weights, remainder = torch.ones(BLOCK), torch.ones(BLOCK).bfloat16(), torch.ones(BLOCK).to(torch.uint16)
    split_kernel()(bits(master), bits(weights), bits(remainder))
    join_kernel()(bits(weights), bits(remainder), bits(master))
    for kind in ("signed", "unsigned"):
        codes, scales = torch.zeros(BLOCK, dtype=torch.uint8), torch.ones(1)
        encode_kernel(kind)(bits(master), bits(codes), bits(scales))
        decode_kernel(kind)(bits(codes), bits(scales), bits(master))


def peak_growth_bytes(work: Callable[[], object]) -> int:
    """How much the resident memory of this process grew at most meanwhile; files in the page cache do not count."""
    compile_kernels()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = memory_line("VmRSS")
    work()
    return memory_line("VmHWM") - before


def memory_line(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
