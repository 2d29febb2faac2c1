"""torch.cuda where there is no device: torch's own Python code over C functions that are not there.

Owns: what CUDA keeps for each thread (device and stream), which devices this process has a context on, and the rules of
the calls, broken by an AssertionError that names the rule.
Does not: run anything late (stream_device.py does), or make tensors on a device: memory is the host's.

A context takes half a GiB of a device. `cudaSetDevice` makes one; torch's guards go back to a device without one only
in name (c10/cuda/CUDAFunctions.cpp), while `torch.cuda.set_stream`, by which a stream context is left, sets it.
"""

import importlib.util
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.doubles.event_streams import FakeRuntime

CUDA = 1
"""The number of this kind of device in torch."""


class _ByThread(threading.local):
    real = 0
    """The device of the runtime."""
    named = -1
    """The one that torch says is current, where it is another that has no context."""

    def __init__(self) -> None:
        self.streams: dict[int, int] = {}
        """Current, by device; 0 is the default one."""


class CudaLayer:
    """Put in place by `install`; `contexts`, `calls` and `pools` are for tests to look at."""

    def __init__(self, num_devices: int = 2) -> None:
        self.contexts: set[int] = set()
        self.calls: list[str] = []
        self.runtime = Runtime(self)
        self.lost = False
        """Waiting for the device raises from now on."""
        self.pools: dict[tuple[int, int], int] = {}
        """Device of each pool that has not been let go."""
        self.recording: set[tuple[int, int]] = set()
        self.num_streams = self.num_pools = 0
        self._num_devices = num_devices
        self._thread = _ByThread()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """torch.cuda calls this layer until `patch` is undone."""
        stream_base, event_base, pool = _classes(self)
        patch.setattr(torch._C, "_CudaStreamBase", stream_base)
        patch.setattr(torch._C, "_CudaEventBase", event_base)
        spec = importlib.util.spec_from_file_location("streams_of_no_device", torch.cuda.streams.__file__)
        assert spec is not None
        assert spec.loader is not None
        streams = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(streams)
        c_functions = {
            "_cuda_getDevice": self.device, "_cuda_setDevice": self.set_device, "_cuda_setStream": self.set_stream,
            "_cuda_getCurrentStream": lambda device: (self.stream(device), device, CUDA),
            "_cuda_synchronize": self.synchronize, "_cuda_emptyCache": lambda: self.calls.append("empty cache"),
        }  # fmt: skip
        for name, function in c_functions.items():
            patch.setattr(torch._C, name, function, raising=False)
        in_cuda = {
            "_exchange_device": self.exchange, "_maybe_exchange_device": self.maybe_exchange, "_cudart": self.runtime,
            "_initialized": True, "_get_device_properties": lambda index: SimpleNamespace(pci_domain_id=0xFFFF),
            "init": lambda: None, "is_available": lambda: True, "device_count": lambda: self._num_devices,
            "manual_seed_all": lambda seed: None,
            "Stream": streams.Stream, "Event": streams.Event, "MemPool": pool,
        }  # fmt: skip
        for name, value in in_cuda.items():
            patch.setattr(torch.cuda, name, value, raising=False)
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        patch.setattr(torch.cuda.memory, "_cuda_beginAllocateCurrentThreadToPool", self.begin_pool)
        patch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", self.end_pool)
        patch.setattr(torch.cuda.memory, "_cuda_releasePool", lambda device, pool: None)

    # ------------------------------------------------------------------------------------------- by thread

    def device(self) -> int:
        return self._thread.named if self._thread.named >= 0 else self._thread.real

    def set_device(self, device: int) -> None:
        self._thread.named = -1
        if device != self._thread.real:
            self._thread.real = device
            self.contexts.add(device)

    def exchange(self, device: int) -> int:
        before = self.device()
        self.set_device(device)
        return before

    def maybe_exchange(self, device: int) -> int:
        before = self.device()
        if device in self.contexts:
            self.set_device(device)
        else:
            self._thread.named = device
        return before

    def stream(self, device: int) -> int:
        return self._thread.streams.get(device, 0)

    def set_stream(self, *, stream_id: int, device_index: int, device_type: int) -> None:
        assert device_type == CUDA
        if self.device() != device_index:
            self.set_device(device_index)
        self._thread.streams[device_index] = stream_id

    # ------------------------------------------------------------------------------------------- the device

    def synchronize(self) -> None:
        self.contexts.add(self.device())
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def begin_pool(self, device: int, pool: tuple[int, int]) -> None:
        assert self.pools[pool] == device, "a pool belongs to the device that was current when it was made"
        assert pool not in self.recording, "torch refuses a pool that another thread allocates from at this moment"
        self.recording.add(pool)
        self.calls.append(f"pool under stream {self.stream(device)} of {device}")

    def end_pool(self, device: int, pool: tuple[int, int]) -> None:
        self.recording.remove(pool)


class Runtime(FakeRuntime):
    """Page-locking gives the current device a context."""

    def __init__(self, layer: CudaLayer) -> None:
        super().__init__()
        self._layer = layer

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self._layer.contexts.add(self._layer.device())
        return super().cudaHostRegister(address, num_bytes, flags)

    def cudaHostUnregister(self, address: int) -> int:
        self._layer.contexts.add(self._layer.device())
        return super().cudaHostUnregister(address)


def _classes(layer: CudaLayer) -> tuple[type, type, type]:
    """What torch.cuda derives its streams and events from, and its pool of memory."""

    class StreamBase:
        def __new__(
            cls, priority: int = 0, stream_id: int = -1, device_index: int = -1, device_type: int = CUDA
        ) -> Any:
            self = super().__new__(cls)
            if stream_id < 0:
                layer.num_streams += 1
                stream_id, device_index = layer.num_streams, layer.device()
            self.stream_id, self.device_index, self.device_type = stream_id, device_index, device_type
            return self

        stream_id: int
        device_index: int
        device_type: int

        @property
        def device(self) -> torch.device:
            return torch.device("cuda", self.device_index)

        @property
        def cuda_stream(self) -> int:
            return 1000 * self.device_index + self.stream_id

        def __eq__(self, other: object) -> bool:
            return isinstance(other, StreamBase) and self.cuda_stream == other.cuda_stream

        def __hash__(self) -> int:
            return self.cuda_stream

    class EventBase:
        def __new__(cls, enable_timing: bool, blocking: bool, interprocess: bool, external: bool = False) -> Any:
            self = super().__new__(cls)
            self.timed, self.blocking, self.device_index, self.time_ms = enable_timing, blocking, -1, 0.0
            return self

        timed: bool
        blocking: bool
        device_index: int
        time_ms: float

        def record(self, stream: StreamBase) -> None:
            assert self.device_index in (-1, stream.device_index), "an event is recorded on streams of one device"
            layer.contexts.add(stream.device_index)
            self.device_index, self.time_ms = stream.device_index, time.perf_counter() * 1e3

        def wait(self, stream: StreamBase) -> None:
            assert self.device_index >= 0, "an event that was never recorded holds nobody up"
            layer.contexts.add(stream.device_index)

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            thread = threading.current_thread().name
            assert self.device_index >= 0, "an event that was never recorded holds nobody up"
            assert "waiter" in thread, f"{thread} waits for the device, which is the waiters' part"
            assert self.blocking, "a waiter that spins takes a core from the optimizer's kernels"
            if layer.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def elapsed_time(self, end: "EventBase") -> float:
            assert self.timed, "both events must be made with enable_timing"
            assert end.timed, "both events must be made with enable_timing"
            assert self.device_index == end.device_index >= 0, "both events must have been recorded, on one device"
            return end.time_ms - self.time_ms

    class Pool:
        def __init__(self, allocator: Any = None, use_on_oom: bool = False, no_split: bool = False) -> None:
            layer.num_pools += 1
            self.id = (0, layer.num_pools)
            layer.pools[self.id] = layer.device()

        def __del__(self) -> None:
            del layer.pools[self.id]
            if layer.lost:
                layer.calls.append("process ended")  # cudaFree fails in a C++ destructor

    return StreamBase, EventBase, Pool
