"""Values of parameters for code outside their owner's forward: what placeholders read from and write to.

Owns: in which dtype the user sees a parameter, and the way from a read or write of it to its homes.
Does not: know which function reads (model/placeholders.py), or order reads and writes of homes (storage/).
Threads: the training thread, and autograd's own in its place.

Note [Two ways to read]: while the model runs (a loss that uses another module's weight), a parameter has the working
dtype, and its partition is acquired as for any use: the schedule learns it and fetches it ahead. Between runs it has
the dtype that it had before the session, and is read from its homes: the fp32 master where it was fp32.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from offload.errors import ParameterWritten
from offload.model.partitions import Entry, Partition
from offload.runtime import Runtime
from offload.storage.values import HomeValues

READS = "parameters read outside their modules"
READ_BYTES = "bytes of parameters read outside their modules"
WRITES = "parameters written outside their modules"


class Uses(Protocol):
    """Who brings weights to the device: weights/fetch.py."""

    def acquire(self, pid: int) -> None:
        """A use of a partition begins."""

    def release(self, pid: int) -> None:
        """It ends."""


class SessionParameters:
    """See model/placeholders.ParameterValues."""

    def __init__(self, runtime: Runtime, home_values: HomeValues, settle: Callable[[], None]) -> None:
        """`settle`: waits until no lane writes weights, raises where the session is closed or has failed."""
        self._places: Mapping[nn.Parameter, tuple[Partition, Entry]] = {
            entry.parameter: (partition, entry) for partition in runtime.partitions for entry in partition.entries()
        }
        self._runtime = runtime
        self._home_values = home_values
        self._settle = settle
        self._writes: Counter[int] = Counter()
        """By partition."""
        self._writes_of: Counter[str] = Counter()
        """By parameter."""
        self._uses: Uses | None = None
        self._is_running: Callable[[], bool] = lambda: False
        self._changed: Callable[[set[int]], None] = lambda pids: None
        self.hook_registered: Callable[[nn.Parameter], None] = lambda parameter: None
        self.begin_backward: Callable[[], None] = lambda: None
        self.is_suspended = False
        """Nobody wants values now: uses of placeholders see them as they are."""

    def connect(
        self,
        uses: Uses,
        is_running: Callable[[], bool],
        changed: Callable[[set[int]], None],
        hook_registered: Callable[[nn.Parameter], None],
        begin_backward: Callable[[], None],
    ) -> None:
        """`is_running`: a forward or backward of the model is under way. `changed(pids)`: their homes have new values.
        `hook_registered(parameter)`: the user has registered a hook on its gradient. `begin_backward`: gradients are
        about to arrive, if nothing has said so before.
        """
        self._uses, self._is_running, self._changed = uses, is_running, changed
        self.hook_registered = hook_registered
        self.begin_backward = begin_backward

    def name(self, parameter: nn.Parameter) -> str:
        """Qualified, in the model."""
        return self._places[parameter][1].name

    def version(self, parameter: nn.Parameter) -> int:
        """Raised by every step that covers the parameter, and by every write."""
        partition, entry = self._places[parameter]
        others = self._writes[partition.id] - self._writes_of[entry.name]  # a write raises the partition's version
        return partition.version - others

    def dtype_of(self, parameter: nn.Parameter) -> torch.dtype:
        """The working dtype while the model runs, else that of before the session."""
        if self._is_running():
            return self._runtime.precision.dtype
        return self._places[parameter][1].original_dtype

    def read(self, parameter: nn.Parameter) -> Tensor:
        """A new tensor with the current values, on the parameter's device. See Note [Two ways to read]."""
        partition, entry = self._places[parameter]
        self._runtime.timeline.count(READS)
        self._runtime.timeline.count(READ_BYTES, entry.numel * self.dtype_of(parameter).itemsize)
        if self._uses is not None and self._is_running():
            self._uses.acquire(partition.id)
            try:
                return parameter.detach().clone()
            finally:
                self._uses.release(partition.id)
        self._settle()
        return self._from_homes(partition, entry)

    def _from_homes(self, partition: Partition, entry: Entry) -> Tensor:
        values = torch.empty(entry.numel, dtype=entry.original_dtype)
        if entry.index >= 0 and entry.original_dtype is not torch.float32:
            start = 0
            for run in self._home_values.weights_of(partition, entry):
                values[start : start + run.numel()].copy_(run)
                start += run.numel()
        else:
            self._home_values.read_into(partition, entry, values)
        return values.view(entry.shape).to(self._runtime.device.torch_device)

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """New values, of the parameter's shape, into its homes."""
        partition, entry = self._places[parameter]
        if self._is_running():
            raise ParameterWritten(
                f"parameter {entry.name!r} was written while a forward or backward of the model was under way, which "
                "may have used the old values already. Write between forward passes."
            )
        self._settle()
        self._runtime.timeline.count(WRITES)
        self._home_values.write(partition, entry, values)
        self._writes[partition.id] += 1
        self._writes_of[entry.name] += 1
        self._changed({partition.id})
