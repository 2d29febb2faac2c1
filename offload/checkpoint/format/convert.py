"""Values as a session wants them, from what is stored: split or plain masters, moments in any encoding.

Owns: which stored state tensors make up a wanted one, and which of these ways are exact.
Does not: read files (reader.py); its arithmetic is that of the kernels.
Threads: one.

Exact, bit for bit: equal encodings; split to plain master and back (every master but NaNs, whose payload goes);
moments into fp32.
Not exact: moments into bf16 or 8 bits, or from one of them into the other; frozen weights into a narrower dtype.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.state import (
    MASTER,
    REMAINDER,
    SCALES,
    WEIGHTS,
    Item,
    Kind,
    Run,
    StateReader,
    StateTensor,
)
from offload.errors import InternalError
from offload.kernels.dynamic_map import BLOCK_8BIT_NUMEL
from offload.kernels.moments import decode_kernel, encode_kernel
from offload.kernels.split import join_kernel, split_kernel
from offload.memory.region import bits

CHUNK_NUMEL: Final = 512 * 1024
"""Elements converted at once: a few MiB of scratch, and a multiple of every block of scales."""

UNSIGNED: Final = frozenset({"exp_avg_sq"})
"""Moments that are never negative: their 8-bit codes are those of the unsigned map."""


def sources_of(stored: Item, wanted: Item, state_tensor: StateTensor) -> tuple[tuple[str, ...], bool]:
    """The stored state tensors that a wanted one is made of, and whether it is exact. Raises where there are none."""
    if stored.kind is not wanted.kind and Kind.BUFFER in (stored.kind, wanted.kind):
        raise CheckpointError(f"{wanted.name!r} is a {wanted.kind} in the model, a {stored.kind} in the checkpoint.")
    if state_tensor.name in (MASTER, WEIGHTS, REMAINDER):
        return _values_of(stored, wanted, state_tensor)
    if stored.kind is not Kind.TRAINABLE:
        return (), True  # as for a parameter that is new to the optimizer: moments of 0
    if stored.state_tensor(state_tensor.name) == state_tensor and (
        _is_float(state_tensor) or _scales_of(stored, state_tensor) == _scales_of(wanted, state_tensor)
    ):
        return (state_tensor.name,), True
    moment = state_tensor.name.removesuffix(SCALES)
    held = stored.state_tensor(moment)
    if held is None or wanted.state_tensor(moment) is None:
        raise CheckpointError(
            f"{wanted.name!r}: the optimizer keeps {state_tensor.name!r}, the checkpoint has "
            f"{', '.join(p.name for p in stored.state_tensors)}. "
            "Load with the kind of optimizer that saved it, or export its weights and start from these."
        )
    # What 8 bits stand for is an fp32 value, the one that their optimizer computes with.
    widened = _is_float(state_tensor) and state_tensor.dtype is torch.float32
    return ((moment,) if _is_float(held) else (moment, moment + SCALES)), widened


def _values_of(stored: Item, wanted: Item, state_tensor: StateTensor) -> tuple[tuple[str, ...], bool]:
    held = (WEIGHTS, REMAINDER) if stored.is_split else (MASTER,) if stored.kind is Kind.TRAINABLE else (WEIGHTS,)
    if stored.is_split and stored.state_tensor(state_tensor.name) == state_tensor:
        return (state_tensor.name,), True
    if stored.kind is Kind.TRAINABLE:
        return held, True  # working weights are exactly what training with this master would use
    narrow = stored.expect(WEIGHTS).dtype
    return held, _holds(torch.float32 if wanted.kind is Kind.TRAINABLE else state_tensor.dtype, narrow)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one dtype is one of the other."""
    if wide is narrow:
        return True
    try:
        return torch.promote_types(wide, narrow) is wide
    except RuntimeError:  # torch promotes no 8-bit floats; every other float that it has holds them
        return wide.is_floating_point and wide.itemsize > narrow.itemsize


def _is_float(state_tensor: StateTensor) -> bool:
    return state_tensor.dtype.is_floating_point and not state_tensor.name.endswith(SCALES)


def _scales_of(item: Item, state_tensor: StateTensor) -> StateTensor | None:
    return item.state_tensor(state_tensor.name.removesuffix(SCALES) + SCALES)


class Converter:
    """Reads wanted runs from stored items."""

    def __init__(self, reader: StateReader, wanted: Mapping[str, Item]) -> None:
        self._reader = reader
        self._wanted = wanted

    def read(self, run: Run, out: Tensor) -> None:
        """Entries of a wanted state tensor into `out`, of its dtype."""
        wanted, stored = self._wanted[run.item], self._reader.items[run.item]
        state_tensor = wanted.expect(run.state_tensor)
        names, _ = sources_of(stored, wanted, state_tensor)
        same = names == (state_tensor.name,) and stored.state_tensor(state_tensor.name) == state_tensor
        if same:
            self._reader.read(run, out)
        elif not names:
            out.zero_()
        else:
            is_value = state_tensor.name in (MASTER, WEIGHTS, REMAINDER)
            step = CHUNK_NUMEL // state_tensor.block_numel
            for start in range(run.start, run.stop, step):
                stop = min(start + step, run.stop)
                into = out[start - run.start : stop - run.start]
                if is_value:
                    self._values(stored, wanted, state_tensor, start, into)
                else:
                    self._moments(stored, state_tensor, start, into)

    # -------------------------------------------------------------------------------------------------- values

    def _values(self, stored: Item, wanted: Item, state_tensor: StateTensor, start: int, out: Tensor) -> None:
        """`master`, `weights` or `remainder`, where they are not stored as such."""
        trained = Kind.TRAINABLE in (stored.kind, wanted.kind)
        if stored.kind is not Kind.TRAINABLE:
            values = self._stored(stored, stored.expect(WEIGHTS), start, start + out.numel())
        else:
            values = self._master(stored, start, start + out.numel())
        # What is trained is rounded as steps round it; what is frozen, as torch casts it.
        if state_tensor.dtype in (torch.uint16, torch.bfloat16) and trained:
            weights = out if state_tensor.name == WEIGHTS else torch.empty(out.numel(), dtype=torch.bfloat16)
            remainder = out if state_tensor.name == REMAINDER else torch.empty(out.numel(), dtype=torch.uint16)
            split_kernel()(bits(values.float()), bits(weights), bits(remainder))
        else:
            out.copy_(values)

    def _master(self, stored: Item, start: int, stop: int) -> Tensor:
        state_tensors = {state_tensor.name: state_tensor for state_tensor in stored.state_tensors}
        if not stored.is_split:
            return self._stored(stored, state_tensors[MASTER], start, stop)
        parts = [self._stored(stored, state_tensors[name], start, stop) for name in (WEIGHTS, REMAINDER)]
        master = torch.empty(stop - start, dtype=torch.float32)
        join_kernel()(bits(parts[0]), bits(parts[1]), bits(master))
        return master

    def _moments(self, stored: Item, state_tensor: StateTensor, start: int, out: Tensor) -> None:
        """A moment in another encoding, through fp32."""
        moment, size = state_tensor.name.removesuffix(SCALES), state_tensor.block_numel
        first, last = start * size, min((start + out.numel()) * size, stored.numel)
        if not _is_float(state_tensor) and (
            first % BLOCK_8BIT_NUMEL or (last % BLOCK_8BIT_NUMEL and last < stored.numel)
        ):
            raise InternalError(
                f"{stored.name!r}: [{first}:{last}] of {state_tensor.name!r} is not made of whole blocks."
            )
        values = self._moment(stored, moment, first, last)
        if _is_float(state_tensor):
            out.copy_(values)
            return
        kind = "unsigned" if moment in UNSIGNED else "signed"
        # Of codes and scales, which are asked for apart, one is thrown away: loading 8 bits from 32 is rare.
        codes = torch.empty(values.numel(), dtype=torch.uint8)
        scales = torch.empty(-(-values.numel() // BLOCK_8BIT_NUMEL), dtype=torch.float32)
        encode_kernel(kind)(bits(values), bits(codes), bits(scales))
        out.copy_(scales if state_tensor.name.endswith(SCALES) else codes)

    def _moment(self, stored: Item, moment: str, start: int, stop: int) -> Tensor:
        held = stored.expect(moment)
        if _is_float(held):
            return self._stored(stored, held, start, stop).float()
        held_scales = stored.expect(moment + SCALES)
        first = start // BLOCK_8BIT_NUMEL * BLOCK_8BIT_NUMEL  # of the block that `start` is in
        values = self._stored(stored, held, first, stop)
        scales = self._stored(stored, held_scales, first // BLOCK_8BIT_NUMEL, -(-stop // BLOCK_8BIT_NUMEL))
        decoded = torch.empty(values.numel(), dtype=torch.float32)
        decode_kernel("unsigned" if moment in UNSIGNED else "signed")(bits(values), bits(scales), bits(decoded))
        return decoded[start - first :]

    def _stored(self, item: Item, state_tensor: StateTensor, start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, dtype=state_tensor.dtype)
        self._reader.read(Run(item.name, state_tensor.name, start, stop), values)
        return values
