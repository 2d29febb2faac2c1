"""What a device is: the copies, computations and collectives that the rest of the package may ask for.

Owns: the protocols that every device implements.
Does not: know streams or events (queues.py), or what is copied and when (weights/, gradients/, optimizer/).
Threads: `h2d`, `d2h`, `collective` may be fed from any lane; `compute` belongs to the training thread and autograd's.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason


class Mark(Protocol):
    """A point in a stream: everything submitted before it is done once it is reached."""

    @property
    def future(self) -> "Future[Any]":
        """Done, on the host, once the point is reached."""


class CopyQueue(Protocol):
    """One direction of the link: copies in order of submission."""

    def after(self, mark: Mark, reason: Reason) -> None:
        """What is submitted from now on starts after `mark`, a point of the compute queue."""

    def copy(self, destination: Tensor, source: Tensor, name: str, *, crosses_link: bool = True) -> None:
        """Copy bytes (uint8, contiguous, equal length). Both must stay alive until a mark recorded later is reached."""

    def resize(self, flat: Tensor, num_bytes: int) -> None:
        """Give `flat`'s storage this many bytes; its contents are undefined."""

    def record(self) -> Mark:
        """The point after everything submitted so far."""


class ComputeQueue(Protocol):
    """Where the model computes."""

    def after(self, mark: Mark, reason: Reason) -> None:
        """What is computed from now on starts after `mark`."""

    def record(self) -> Mark:
        """The point after everything computed so far."""


class CollectiveQueue(Protocol):
    """Collectives between ranks, in order of submission: every rank submits the same ones in the same order."""

    def after(self, mark: Mark, reason: Reason) -> None:
        """What is run from now on starts after `mark`."""

    def run(self, work: Callable[[], Any], name: str, num_bytes: int) -> None:
        """Issue `work`, a collective of torch.distributed that moves `num_bytes` of this rank. Its tensors must stay
        alive until a mark recorded later is reached. On the host it runs in the calling thread and is over on return.
        """

    def record(self) -> Mark:
        """The point after everything run so far."""


class Device(Protocol):
    """A device and its link."""

    torch_device: torch.device
    is_host: bool
    """Kernels of the host can address its memory."""
    slots_share_a_block: bool
    """Slots are cut from one block of memory: it needs room for one more than are in use."""
    numa_node: int
    """Of the host memory that is nearest; -1 where none is."""

    @property
    def compute(self) -> ComputeQueue:
        """Where the model computes."""

    @property
    def h2d(self) -> CopyQueue:
        """Copies from the host."""

    @property
    def d2h(self) -> CopyQueue:
        """Copies to the host."""

    @property
    def collective(self) -> CollectiveQueue:
        """Collectives between ranks."""

    def allocate(self, num_bytes: int) -> Tensor:
        """uint8 memory on the device."""

    def reserve_slots(self, num_bytes: int) -> None:
        """Have this much ready for slots: the bytes of their ring, and on an accelerator one more of the largest, as
        memory is given out in blocks (accelerator.py, Note [One slot more]). Before the first fetch."""

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        """Page-lock host memory for copies; returns what undoes it."""

    def free_bytes(self) -> int:
        """Bytes free on the device now."""

    def close(self) -> None:
        """Wait for everything submitted."""
