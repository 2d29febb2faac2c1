"""Values as a session wants them, from what is stored: split or plain masters, moments in any encoding.

Owns: which stored planes make up a wanted one, and which of these ways are exact.
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

from offload.checkpoint.errors import CheckpointError
from offload.checkpoint.state import MASTER, REMAINDER, SCALES, WEIGHTS, Item, Kind, PlaneSpec, Run, StateReader
from offload.errors import InternalError
from offload.kernels.dynamic_map import BLOCK_8BIT_NUMEL
from offload.kernels.moments import decode_kernel, encode_kernel
from offload.kernels.split import join_kernel, split_kernel
from offload.memory.region import bits

CHUNK_NUMEL: Final = 512 * 1024
"""Elements converted at once: a few MiB of scratch, and a multiple of every block of scales."""

UNSIGNED: Final = frozenset({"exp_avg_sq"})
"""Moments that are never negative: their 8-bit codes are those of the unsigned map."""


def sources_of(stored: Item, wanted: Item, plane: PlaneSpec) -> tuple[tuple[str, ...], bool]:
    """The stored planes that a wanted plane is made of, and whether it is exact. Raises where it cannot be made."""
    if stored.kind is not wanted.kind and Kind.BUFFER in (stored.kind, wanted.kind):
        raise CheckpointError(f"{wanted.name!r} is a {wanted.kind} in the model, a {stored.kind} in the checkpoint.")
    if plane.name in (MASTER, WEIGHTS, REMAINDER):
        return _values_of(stored, wanted, plane)
    if stored.kind is not Kind.TRAINABLE:
        return (), True  # as for a parameter that is new to the optimizer: moments of 0
    if stored.plane(plane.name) == plane and (
        _is_float(plane) or _scales_of(stored, plane) == _scales_of(wanted, plane)
    ):
        return (plane.name,), True
    moment = plane.name.removesuffix(SCALES)
    held = stored.plane(moment)
    if held is None or wanted.plane(moment) is None:
        raise CheckpointError(
            f"{wanted.name!r}: the optimizer keeps {plane.name!r}, the checkpoint has "
            f"{', '.join(p.name for p in stored.planes)}. "
            "Load with the kind of optimizer that saved it, or export its weights and start from these."
        )
    # What 8 bits stand for is an fp32 value, the one that their optimizer computes with.
    widened = _is_float(plane) and plane.dtype is torch.float32
    return ((moment,) if _is_float(held) else (moment, moment + SCALES)), widened


def _values_of(stored: Item, wanted: Item, plane: PlaneSpec) -> tuple[tuple[str, ...], bool]:
    held = (WEIGHTS, REMAINDER) if stored.is_split else (MASTER,) if stored.kind is Kind.TRAINABLE else (WEIGHTS,)
    if stored.is_split and stored.plane(plane.name) == plane:
        return (plane.name,), True
    if stored.kind is Kind.TRAINABLE:
        return held, True  # working weights are exactly what training with this master would use
    source = stored.plane(WEIGHTS)
    assert source is not None
    return held, _holds(torch.float32 if wanted.kind is Kind.TRAINABLE else plane.dtype, source.dtype)


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every value of one dtype is one of the other."""
    if wide is narrow:
        return True
    try:
        return torch.promote_types(wide, narrow) is wide
    except RuntimeError:  # torch promotes no 8-bit floats; every other float that it has holds them
        return wide.is_floating_point and wide.itemsize > narrow.itemsize


def _is_float(plane: PlaneSpec) -> bool:
    return plane.dtype.is_floating_point and not plane.name.endswith(SCALES)


def _scales_of(item: Item, plane: PlaneSpec) -> PlaneSpec | None:
    return item.plane(plane.name.removesuffix(SCALES) + SCALES)


class Converter:
    """Reads wanted runs from stored items."""

    def __init__(self, reader: StateReader, wanted: Mapping[str, Item]) -> None:
        self._reader = reader
        self._wanted = wanted

    def read(self, run: Run, out: Tensor) -> None:
        """Entries of a wanted plane into `out`, of its dtype."""
        wanted, stored = self._wanted[run.item], self._reader.items[run.item]
        plane = wanted.plane(run.plane)
        assert plane is not None
        names, _ = sources_of(stored, wanted, plane)
        same = names == (plane.name,) and stored.plane(plane.name) == plane
        if same:
            self._reader.read(run, out)
        elif not names:
            out.zero_()
        else:
            is_value = plane.name in (MASTER, WEIGHTS, REMAINDER)
            step = CHUNK_NUMEL // plane.block_numel
            for start in range(run.start, run.stop, step):
                stop = min(start + step, run.stop)
                into = out[start - run.start : stop - run.start]
                if is_value:
                    self._values(stored, wanted, plane, start, into)
                else:
                    self._moments(stored, plane, start, into)

    # -------------------------------------------------------------------------------------------------- values

    def _values(self, stored: Item, wanted: Item, plane: PlaneSpec, start: int, out: Tensor) -> None:
        """`master`, `weights` or `remainder`, where they are not stored as such."""
        trained = Kind.TRAINABLE in (stored.kind, wanted.kind)
        if stored.kind is not Kind.TRAINABLE:
            held = stored.plane(WEIGHTS)
            assert held is not None
            values = self._stored(stored, held, start, start + out.numel())
        else:
            values = self._master(stored, start, start + out.numel())
        # What is trained is rounded as steps round it; what is frozen, as torch casts it.
        if plane.dtype in (torch.uint16, torch.bfloat16) and trained:
            weights = out if plane.name == WEIGHTS else torch.empty(out.numel(), dtype=torch.bfloat16)
            remainder = out if plane.name == REMAINDER else torch.empty(out.numel(), dtype=torch.uint16)
            split_kernel()(bits(values.float()), bits(weights), bits(remainder))
        else:
            out.copy_(values)

    def _master(self, stored: Item, start: int, stop: int) -> Tensor:
        planes = {plane.name: plane for plane in stored.planes}
        if not stored.is_split:
            return self._stored(stored, planes[MASTER], start, stop)
        parts = [self._stored(stored, planes[name], start, stop) for name in (WEIGHTS, REMAINDER)]
        master = torch.empty(stop - start, dtype=torch.float32)
        join_kernel()(bits(parts[0]), bits(parts[1]), bits(master))
        return master

    def _moments(self, stored: Item, plane: PlaneSpec, start: int, out: Tensor) -> None:
        """A moment in another encoding, through fp32."""
        moment, size = plane.name.removesuffix(SCALES), plane.block_numel
        first, last = start * size, min((start + out.numel()) * size, stored.numel)
        if not _is_float(plane) and (first % BLOCK_8BIT_NUMEL or (last % BLOCK_8BIT_NUMEL and last < stored.numel)):
            raise InternalError(f"{stored.name!r}: [{first}:{last}] of {plane.name!r} is not made of whole blocks.")
        values = self._moment(stored, moment, first, last)
        if _is_float(plane):
            out.copy_(values)
            return
        kind = "unsigned" if moment in UNSIGNED else "signed"
        # Of codes and scales, which are asked for apart, one is thrown away: loading 8 bits from 32 is rare.
        codes = torch.empty(values.numel(), dtype=torch.uint8)
        scales = torch.empty(-(-values.numel() // BLOCK_8BIT_NUMEL), dtype=torch.float32)
        encode_kernel(kind)(bits(values), bits(codes), bits(scales))
        out.copy_(scales if plane.name.endswith(SCALES) else codes)

    def _moment(self, stored: Item, moment: str, start: int, stop: int) -> Tensor:
        held = stored.plane(moment)
        assert held is not None
        if _is_float(held):
            return self._stored(stored, held, start, stop).float()
        scale_plane = stored.plane(moment + SCALES)
        assert scale_plane is not None
        first = start // BLOCK_8BIT_NUMEL * BLOCK_8BIT_NUMEL  # of the block that `start` is in
        values = self._stored(stored, held, first, stop)
        scales = self._stored(stored, scale_plane, first // BLOCK_8BIT_NUMEL, -(-stop // BLOCK_8BIT_NUMEL))
        decoded = torch.empty(values.numel(), dtype=torch.float32)
        decode_kernel("unsigned" if moment in UNSIGNED else "signed")(bits(values), bits(scales), bits(decoded))
        return decoded[start - first :]

    def _stored(self, item: Item, plane: PlaneSpec, start: int, stop: int) -> Tensor:
        values = torch.empty(stop - start, dtype=plane.dtype)
        self._reader.read(Run(item.name, plane.name, start, stop), values)
        return values
