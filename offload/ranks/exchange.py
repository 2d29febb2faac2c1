"""Exchange of shards: what the ranks send each other while they train, in program order on a lane of its own.

Owns: the lane `collective issue`, the memory in which parts of other ranks arrive.
Does not: know what weights or gradients are for; talk to torch.distributed (collectives.py).
Threads: units are submitted by the training thread and autograd's own, and run on the lane.

Note [Collective order]: a collective ends only when all ranks take part, so all must issue them in one order. That is
the order of submission by the training thread, which is a function of the program alone; a unit waits for its inputs
on the lane. Before each, the ranks compare what they are about to do: a rank whose control flow differs is an error
that names both sides, not a hang and not a mixture of two tensors.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.config import Precision
from offload.device.protocol import Device, Mark
from offload.kernels import mean
from offload.memory.region import bits, typed
from offload.ranks.protocol import Ranks

PART_NUMEL: Final = 1024 * 1024
"""Elements that an accelerator sums at once: its fp32 sums are in no budget."""


class ShardExchange:
    """Gathers weights and averages gradients over the ranks."""

    def __init__(
        self, ranks: Ranks, *, received: Tensor, precision: Precision, in_fp32: bool, device: Device, lanes: Lanes
    ) -> None:
        """`received`: uint8 memory on the device, as large as the largest gradient of a partition."""
        self.ranks = ranks
        self._received = received
        self._precision = precision
        self._in_fp32 = in_fp32
        self._device = device
        self._lanes = lanes
        self._lane = lanes.lane("collective issue")
        self._mean = mean.mean_of_shards_kernel(precision.value)

    def gather(
        self, name: str, flat_parameters: Sequence[tuple[Tensor, Tensor]], copied: "Future[Mark]"
    ) -> "Future[Mark]":
        """Every (whole, own shard) becomes whole. The own shards arrive at the mark that `copied` resolves to."""
        self.ranks.ask(f"gather the weights of {name}")
        return self._lane.submit(partial(self._gather, name, flat_parameters, copied), f"gather: {name}")

    def average(self, name: str, whole: Tensor, ready: Mark) -> "Future[Mark]":
        """This rank's shard of `whole` (uint8) becomes the mean of all ranks', in place; the rest is undefined."""
        self.ranks.ask(f"average the gradients of {name}")
        return self._lane.submit(partial(self._average, name, whole, ready), f"average: {name}")

    # --------------------------------------------------------------------------------------------- the lane

    def _gather(self, name: str, flat_parameters: Sequence[tuple[Tensor, Tensor]], copied: "Future[Mark]") -> Mark:
        # The event does not exist before the copies have been issued.
        arrived = self._lanes.wait(copied, Reason.FETCH_ISSUED)
        self.ranks.check_order(f"gather the weights of {name}")
        # Without this the other ranks get what the slot held before.
        self._device.collective.after(arrived, Reason.SHARD_ARRIVED)
        for whole, shard in flat_parameters:
            work = partial(self._gather_flat, whole, shard)
            self._device.collective.run(work, f"weights all-gather: {name}", whole.numel() - shard.numel())
        return self._device.collective.record()

    def _gather_flat(self, whole: Tensor, shard: Tensor) -> None:
        self._lanes.declare(reads=[shard], writes=[whole])
        self.ranks.all_gather(whole, shard)

    def _average(self, name: str, whole: Tensor, ready: Mark) -> Mark:
        self.ranks.check_order(f"average the gradients of {name}")
        # Without this a gradient is sent that the device has not finished computing.
        self._device.collective.after(ready, Reason.GRADIENT_READY)
        length = whole.numel() // self.ranks.world_size
        shard = whole[self.ranks.rank * length : (self.ranks.rank + 1) * length]
        work = partial(self._in_rank_order if self._in_fp32 else self._in_working_dtype, whole, shard)
        self._device.collective.run(work, f"gradients average: {name}", whole.numel() - length)
        return self._device.collective.record()

    def _in_rank_order(self, whole: Tensor, shard: Tensor) -> None:
        """All parts of the own shard from all ranks, summed in fp32 in the order of ranks: half the bytes of a
        reduce-scatter in fp32, and the same bits whatever the algorithm of the library.
        """
        received = self._received[: whole.numel()]
        self._lanes.declare(reads=[whole], writes=[whole, received])
        self.ranks.all_to_all(received, whole)
        rows = typed(received, self._precision.dtype).view(self.ranks.world_size, -1)
        scale = 1.0 / self.ranks.world_size
        if self._device.is_host:
            parts = bits(rows.view(-1)).reshape(rows.shape)
            self._mean(parts, bits(typed(shard, self._precision.dtype)), scale)
            return
        out = typed(shard, self._precision.dtype)
        for start in range(0, rows.shape[1], PART_NUMEL):
            part = rows[:, start : start + PART_NUMEL]
            total = part[0].float()
            for row in part[1:]:
                total += row
            out[start : start + PART_NUMEL].copy_(total.mul_(scale))

    def _in_working_dtype(self, whole: Tensor, shard: Tensor) -> None:
        """Divided first, so that sums in 16 bit do not overflow."""
        self._lanes.declare(reads=[whole], writes=[whole, self._received[: shard.numel()]])
        values = typed(whole, self._precision.dtype)
        values.mul_(1.0 / self.ranks.world_size)
        received = typed(self._received[: shard.numel()], self._precision.dtype)
        self.ranks.reduce_scatter(received, values)
        typed(shard, self._precision.dtype).copy_(received)
