"""An accelerator that is not there, and the host device under observation.

The accelerator: its compute and both copy directions are lanes, far from the training thread.

Owns: the deferral of every torch operation of the training thread to the lane "stream"; poisoned slots; which memory is
the device's. Operations report what they read and write of it.
Does not: decide when a lane runs (turns.py, late.py) or whether an access was ordered (clocks.py).

The memory is the host's and `is_host` is False: nothing of the product reaches into it but through the copy queues.
"""

import ctypes
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, Reason
from offload.device.host import HostDevice
from tests.doubles.turns import TurnLanes


class StreamMark:
    """A point in a stream."""

    def __init__(self, future: "Future[Any]") -> None:
        self.future = future


class Stream:
    """A stream of copies or of computation."""

    def __init__(self, name: str, lanes: Lanes) -> None:
        self._name = name
        self._lanes = lanes
        self._lane = lanes.lane(name)
        self._last: Future[Any] = lanes.resolved(f"{name} begin")
        self._lock = threading.Lock()  # several lanes may feed one direction
        self.tracked: set[int] = set()
        """Storages of device memory."""

    def submit(self, work: Callable[[], Any], name: str) -> None:
        with self._lock:
            self._last = self._lane.submit(work, f"{self._name} {name}")

    def after(self, mark: Any, reason: Reason) -> None:
        if not (isinstance(self._lanes, TurnLanes) and self._lanes.skips()):
            self.submit(lambda: self._lanes.wait(mark.future, reason), str(reason))

    def copy(self, destination: Tensor, source: Tensor, name: str, *, crosses_link: bool = True) -> None:
        def work() -> None:
            self._lanes.declare(reads=[source], writes=[destination])
            ctypes.memmove(destination.data_ptr(), source.data_ptr(), destination.numel())
            if crosses_link:
                self._lanes.timeline.add_work(self._name, name, 0.0, 0.0, destination.numel())

        self.submit(work, name)

    def resize(self, flat: Tensor, num_bytes: int) -> None:
        storage = flat.untyped_storage()
        if storage.nbytes() < num_bytes:
            storage.resize_(num_bytes)  # the allocator's part runs at once, as on an accelerator
            self.tracked.add(storage._cdata)
        # Freed memory stays, so that a late reader finds poison instead of a crash.
        memory = flat.detach().view(torch.uint8)
        self.submit(lambda: self._lanes.declare(reclaims=[memory]), "resize")

    def run(self, work: Callable[[], Any], name: str, num_bytes: int) -> None:
        """A collective. What it touches is declared by `work`."""

        def timed() -> None:
            with self._lanes.timeline.work(self._name, name, num_bytes):
                work()

        self.submit(timed, name)

    def record(self) -> StreamMark:
        return StreamMark(self._last)

    def wait_host(self) -> None:
        """What a synchronising operation does."""
        self._lanes._block(self._last, Reason.WEIGHTS_ARRIVED)
        if isinstance(self._lanes, TurnLanes):
            self._lanes.joined(self._last)
        self._last.result()


class StreamDevice:
    """The device. Run the training loop inside `with device.operations():`."""

    is_host = False
    slots_share_a_block = False
    numa_node = -1

    def __init__(self, lanes: Lanes) -> None:
        self.torch_device = torch.device("cpu")
        self.compute: Any = Stream("stream", lanes)
        self.h2d: Any = Stream("h2d", lanes)
        self.d2h: Any = Stream("d2h", lanes)
        self.collective: Any = Stream("collective", lanes)
        self.h2d.tracked = self.d2h.tracked = self.collective.tracked = self.compute.tracked
        self._lanes = lanes

    def operations(self) -> "Deferring":
        return Deferring(self.compute, self._lanes)

    def allocate(self, num_bytes: int) -> Tensor:
        memory = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        self.compute.tracked.add(memory.untyped_storage()._cdata)
        return memory

    def reserve_slots(self, num_bytes: int) -> None:
        """Slots are ordinary memory."""

    def register(self, address: int, num_bytes: int) -> Callable[[], None]:
        return lambda: None

    def free_bytes(self) -> int:
        return 1 << 40

    def close(self) -> None:
        """Its lanes are closed by their owner."""


class Deferring(TorchDispatchMode):
    """Every operation of this thread becomes a unit of the stream; what returns a number waits for it."""

    def __init__(self, stream: Stream, lanes: Lanes) -> None:
        super().__init__()
        self._stream = stream
        self._lanes = lanes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        writes = any(alias.is_write for alias in aliases)
        if not tensors or (aliases and not writes):
            return func(*args, **kwargs)  # a factory, or a view: no bytes are touched
        outputs = None if writes else _allocated(func, args, kwargs)
        if outputs is None and not (writes and len(func._schema.returns) <= 1):
            self._stream.wait_host()  # its result depends on values, or it is of a kind not thought of here
            return func(*args, **kwargs)
        # The parameter may point elsewhere by the time the unit runs: what counts is what it points at now.
        now = [value.data if isinstance(value, Tensor) else value for value in flat]
        later_args, later_kwargs = tree_unflatten(now, spec)
        places = touched(self._stream.tracked, func, later_args, later_kwargs)
        self._stream.submit(partial(self._run, func, later_args, later_kwargs, outputs, places), func.__name__)
        if outputs is not None:
            return outputs
        return args[0] if func._schema.returns else None

    def _run(self, func: Any, args: Any, kwargs: Any, outputs: Any, places: Any) -> None:
        self._lanes.declare(reads=places[0], writes=places[1])
        with torch.no_grad():
            results = func(*args, **kwargs)
            if outputs is not None:
                for output, result in zip(tree_flatten(outputs)[0], tree_flatten(results)[0], strict=True):
                    if isinstance(output, Tensor):
                        output.data.copy_(result)  # no new version: autograd has saved it


def touched(tracked: set[int], func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What an operation reads and writes of device memory."""
    reads: list[Tensor] = []
    writes: list[Tensor] = []
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        alias = argument.alias_info
        for value in tree_flatten(given.get(argument.name))[0]:
            if isinstance(value, Tensor) and value.untyped_storage()._cdata in tracked:
                (writes if alias is not None and alias.is_write else reads).append(value)
    return reads, writes


class WatchedHost(HostDevice):
    """The product's own device for CPU; inside `operations()` it is said what the training thread touches."""

    def __init__(self, lanes: Lanes) -> None:
        super().__init__(lanes)
        self.tracked: set[int] = set()
        self._lanes = lanes
        resize = self.h2d.resize

        def tracking(flat: Tensor, num_bytes: int) -> None:
            self.tracked.add(flat.untyped_storage()._cdata)
            resize(flat, num_bytes)

        self.h2d.resize = tracking  # type: ignore[method-assign]

    def operations(self) -> "Watching":
        return Watching(self.tracked, self._lanes)

    def allocate(self, num_bytes: int) -> Tensor:
        memory = super().allocate(num_bytes)
        self.tracked.add(memory.untyped_storage()._cdata)
        return memory


class Watching(TorchDispatchMode):
    """Operations run at once. Those on device memory are declared; one on memory that is gone raises."""

    def __init__(self, tracked: set[int], lanes: Lanes) -> None:
        super().__init__()
        self._tracked = tracked
        self._lanes = lanes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        if not aliases or any(alias.is_write for alias in aliases):  # not a view
            reads, writes = touched(self._tracked, func, args, kwargs)
            for tensor in reads + writes:
                if tensor.numel() and not tensor.untyped_storage().nbytes():
                    raise AssertionError(f"{func} on a tensor of shape {tuple(tensor.shape)} whose memory is gone")
            self._lanes.declare(reads=reads, writes=writes)
        return func(*args, **kwargs)


def _allocated(func: Any, args: Any, kwargs: Any) -> Any:
    """Memory for the outputs; None where their shapes depend on values."""

    def without_memory(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    def with_memory(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)

    try:
        shapes = func(*tree_map(without_memory, args), **tree_map(without_memory, kwargs))
    except (RuntimeError, NotImplementedError):
        return None
    outputs = tree_map(with_memory, shapes)
    return outputs if any(isinstance(o, Tensor) for o in tree_flatten(outputs)[0]) else None
