"""Gradient offload on an accelerator: gradients from a slot into homes on the same device, and their sums of squares.

Owns: the pass over gradients that stay on the device, and the sums there of what these homes hold.
Does not: decide what is offloaded where, or when (offload.py).
Threads: the lane `d2h issue` issues; what is issued runs on the d2h stream.

Sums are taken as on the host, in fp64 over the same segments, but added in another order: the norm agrees to 1e-15 of
itself. They are copied to page-locked memory afterwards, and the lane `gradient store` waits for that copy as it does
for a gradient's.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from offload.concurrency.lanes import Lanes
from offload.config import Precision
from offload.device.protocol import CollectiveQueue, Device
from offload.gradients.chunks import GradientChunk, Segments, Update
from offload.memory.region import typed
from offload.units import Tier

OFFLOAD_WORKSPACE_ITEMSIZE: Final = 8
"""Bytes of workspace for each element of the largest chunk: its gradient in fp64."""


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
    """Stores chunks whose home is on the device."""

    def __init__(
        self,
        targets: Sequence[GradientChunk],
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

    def issue(self, update: Update, source: Tensor) -> None:
        """Issue the gradient offload of one chunk from `source` (the bytes of its elements in the slot)."""
        name = f"gradient: {update.target.chunk.partition}"
        self._queue.run(partial(self._store, update, source), name, 0)  # nothing crosses the link

    def _store(self, update: Update, source: Tensor) -> None:
        target, numel = update.target, update.target.chunk.numel
        self._lanes.declare(reads=[source], writes=[target.home.bytes, target.sums_place(), self._workspace])
        values = typed(source, self._wire)
        home = typed(target.home.bytes[: numel * self._home.itemsize], self._home)
        if not len(update.again):
            for low, high in update.runs:
                home[low:high].copy_(values[low:high])
        else:
            for stripe in stripes(target.starts, target.stops, update.first):
                part = slice(stripe.start, stripe.start + stripe.rows * stripe.length)
                home[part].copy_(values[part])
            for stripe in stripes(target.starts, target.stops, update.again):
                part = slice(stripe.start, stripe.start + stripe.rows * stripe.length)
                home[part].add_(values[part])  # in fp32, rounded to even where the home has 16 bits, as on the host
        self._square(update, home)

    def _square(self, update: Update, home: Tensor) -> None:
        target, segments = update.target, np.concatenate([update.first, update.again])
        on_device, on_host, whole = self._sums[self._key(target)]
        is_whole = len(segments) == len(target.starts)
        for low, high in update.runs:
            self._workspace[low:high].copy_(home[low:high]).square_()
        for stripe in whole if is_whole else stripes(target.starts, target.stops, segments):
            squares = self._workspace[stripe.start : stripe.start + stripe.rows * stripe.length]
            sums = on_device[stripe.first : stripe.first + stripe.rows]
            torch.sum(squares.view(stripe.rows, stripe.length), dim=1, out=sums)
        on_host.copy_(on_device, non_blocking=True)  # all of them: those that did not arrive are there as they were

    def _key(self, target: GradientChunk) -> int:
        return target.home.bytes.data_ptr()
