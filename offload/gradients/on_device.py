"""Gradient offload at home on an accelerator: gradients from a slot into homes beside it, and their sums of squares.

Owns: the pass over gradients that stay on the device, and the sums there of what these homes hold.
Does not: decide what is offloaded where, or when (gradient offload.py).
Threads: the lane `d2h issue` issues; what is issued runs on the d2h stream.

Sums are taken as on the host, in fp64 over the same segments, but added in another order: the norm agrees to 1e-15 of
itself. They go to page-locked memory behind the pass, and `land` waits for that copy as it does for a gradient's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from offload.concurrency.lanes import Lanes
from offload.config import Precision
from offload.device.protocol import CollectiveQueue, Device
from offload.memory.region import typed
from offload.storage.homes import Chunk, Home
from offload.units import Tier

OFFLOAD_WORKSPACE_ITEMSIZE: Final = 8
"""Bytes of workspace for each element of the largest chunk: its gradient in fp64."""

Segments = np.ndarray[Any, Any]


class Target(Protocol):
    """Of gradient offload.GradientChunk, what is used here."""

    chunk: Chunk
    home: Home
    starts: Segments
    stops: Segments
    sums: Segments

    def sums_place(self) -> tuple[str, int, int, int]:
        """The sums of squares, for `Lanes.declare`."""


class _Stripe(NamedTuple):
    """Neighbouring segments of one length without a gap: one sum over rows."""

    first: int
    rows: int
    start: int
    length: int


def stripes(starts: Segments, stops: Segments, segments: Segments) -> list[_Stripe]:
    """These segments, in as few stripes as they make."""
    made: list[_Stripe] = []
    for segment in np.sort(segments).tolist():
        start, length = int(starts[segment]), int(stops[segment] - starts[segment])
        last = made[-1] if made else None
        if (
            last is not None
            and last.first + last.rows == segment
            and last.length == length
            and last.start + last.rows * length == start
        ):
            made[-1] = last._replace(rows=last.rows + 1)
        else:
            made.append(_Stripe(segment, 1, start, length))
    return made


class DeviceOffload:
    """Lands chunks that are at home on the device."""

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        workspace: Tensor,
        wire: Precision,
        home: Precision,
        device: Device,
        lanes: Lanes,
    ) -> None:
        self._workspace = typed(workspace, torch.float64)
        self._wire = wire.dtype
        self._home = home.dtype
        self._queue = cast(CollectiveQueue, device.d2h)  # a stream of its own, which runs anything
        self._lanes = lanes
        self._sums: dict[int, tuple[Tensor, Tensor, list[_Stripe]]] = {}
        """By place of the home: the sums on the device, where the host finds them, and the stripes of all of them."""
        here = [target for target in targets if target.home.tier is Tier.DEVICE]
        num = sum(len(target.starts) for target in here)
        # Eight bytes for each block of the norm: few enough for torch's own page-locked memory.
        on_device = torch.zeros(num, dtype=torch.float64, device=device.torch_device)
        on_host = torch.zeros(num, dtype=torch.float64, pin_memory=device.torch_device.type != "cpu")
        at = 0
        for target in here:
            part = slice(at, at + len(target.starts))
            whole = stripes(target.starts, target.stops, np.arange(len(target.starts)))
            self._sums[self._key(target)] = on_device[part], on_host[part], whole
            target.sums = on_host[part].numpy()
            at = part.stop

    def issue(
        self, target: Target, source: Tensor, runs: Sequence[tuple[int, int]], first: Segments, again: Segments
    ) -> None:
        """Issue the gradient offload of one chunk from `source` (the bytes of its elements in the slot).

        `runs`: what arrives, in elements. Segments `first` overwrite the home, `again` add to it.
        """
        name = f"gradient {target.chunk.partition_id}"
        self._queue.run(partial(self._store, target, source, runs, first, again), name, 0)  # nothing crosses the link

    def _store(
        self, target: Target, source: Tensor, runs: Sequence[tuple[int, int]], first: Segments, again: Segments
    ) -> None:
        numel = target.chunk.numel
        self._lanes.declare(reads=[source], writes=[target.home.bytes, target.sums_place(), self._workspace])
        values = typed(source, self._wire)
        home = typed(target.home.bytes[: numel * self._home.itemsize], self._home)
        if not len(again):
            for low, high in runs:
                home[low:high].copy_(values[low:high])
        else:
            for stripe in stripes(target.starts, target.stops, first):
                part = slice(stripe.start, stripe.start + stripe.rows * stripe.length)
                home[part].copy_(values[part])
            for stripe in stripes(target.starts, target.stops, again):
                part = slice(stripe.start, stripe.start + stripe.rows * stripe.length)
                home[part].add_(values[part])  # in fp32, rounded to even where the home has 16 bits, as on the host
        self._square(target, home, runs, np.concatenate([first, again]))

    def _square(self, target: Target, home: Tensor, runs: Sequence[tuple[int, int]], segments: Segments) -> None:
        on_device, on_host, whole = self._sums[self._key(target)]
        is_whole = len(segments) == len(target.starts)
        for low, high in runs:
            self._workspace[low:high].copy_(home[low:high]).square_()
        for stripe in whole if is_whole else stripes(target.starts, target.stops, segments):
            squares = self._workspace[stripe.start : stripe.start + stripe.rows * stripe.length]
            sums = on_device[stripe.first : stripe.first + stripe.rows]
            torch.sum(squares.view(stripe.rows, stripe.length), dim=1, out=sums)
        on_host.copy_(on_device, non_blocking=True)  # all of them: those that did not arrive are there as they were

    def _key(self, target: Target) -> int:
        return target.home.bytes.data_ptr()
