"""The step of one chunk on the step lane: what it waits for, the kernel, the new state and weights.

Owns: when the step of a chunk may begin, in which buffers it runs, when its staging buffer is released.
Does not: order chunks (step_queue.py), read ahead (state_reads.py), or know the arithmetic (kernel_step.py,
device_step.py, torch_step.py).
Threads: the lane `step`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from torch import Tensor

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Reason
from offload.device.protocol import Mark
from offload.memory.region import typed
from offload.memory.ring import Lease
from offload.optimizer.chunk_step import ChunkStep, StagedStep, StateChunk, weights_are_staged
from offload.optimizer.decision import StepDecision
from offload.optimizer.device_step import DeviceStepper
from offload.optimizer.kernel_step import Run, Stepper
from offload.optimizer.request import StepRequest
from offload.runtime import Runtime
from offload.storage.chunk_state import ChunkState
from offload.storage.homes import DiskHome
from offload.units import Tier
from offload.weights.fetch import FetchInFlight


@dataclass(frozen=True, slots=True)
class SubmittedStep:
    """One step as the lanes know it."""

    request: StepRequest
    decision: "Future[StepDecision]"
    all_offloaded: "Future[Any]"
    """The last gradient offload before the step."""
    last_fetch: Mapping[int, FetchInFlight]
    """By partition, the newest fetch of the old weights."""
    compute_done: Mark
    """After the last use of the old weights."""


class _Buffers(NamedTuple):
    """Where the kernel works on one chunk (uint8)."""

    record: Tensor
    gradient: Tensor
    weights: Tensor


class ChunkStepper:
    """Steps chunks by a kernel of the host, or on the device that they are resident on."""

    def __init__(
        self, runtime: Runtime, stepper: Stepper, device_stepper: DeviceStepper | None, num_steps: Mapping[int, int]
    ) -> None:
        """`device_stepper`: for state on an accelerator. `num_steps`: taken by every parameter, by Entry.index."""
        self._partitions = runtime.partitions
        self._precision = runtime.precision
        self._gradient_dtype = runtime.gradient_precision.dtype
        self._device = runtime.device
        self._lanes = runtime.lanes
        self._stepper = stepper
        self._device_stepper = device_stepper
        self._num_steps = num_steps
        self._first_numels = list(accumulate((p.trainable.numel for p in runtime.partitions), initial=0))

    def writes_on_device(self, chunk: StateChunk) -> bool:
        """New weights are on their way to the device when the step is done, not there."""
        return chunk.weights.tier is Tier.DEVICE and (
            weights_are_staged(chunk.weights, chunk.state) or self._stepper_on_device(chunk) is not None
        )

    def _stepper_on_device(self, chunk: StateChunk) -> DeviceStepper | None:
        return self._device_stepper if chunk.state.tier is Tier.DEVICE else None

    def step(self, step: ChunkStep, submitted: SubmittedStep) -> None:
        """Step one chunk, unless the whole step is skipped or the chunk has no gradient."""
        chunk, lease = step.chunk, self._wait_staged(step)
        decision = submitted.decision.result()  # a unit of the same lane
        if decision.skipped or submitted.request.offloaded[chunk.pid].isdisjoint(chunk.gradient.owners):
            if lease is not None:
                lease.release()
            return
        last_fetch = submitted.last_fetch.get(chunk.pid)
        if last_fetch is not None:
            # Without these a copy that still reads the old weights sends half of each to the device.
            copied = self._lanes.wait(last_fetch.issued, Reason.WEIGHTS_READ)
            self._lanes.wait(copied.future, Reason.WEIGHTS_READ)
        buffers = _buffers(chunk, lease)
        device_stepper = self._stepper_on_device(chunk)
        if device_stepper is not None:
            chunk.gradient.read_by = device_stepper.step(
                chunk.state_tensors, buffers, self._runs(chunk, submitted.request), submitted.request.hypers,
                numel=chunk.numel, scale=decision.scale, compute_done=submitted.compute_done,
                name=f"step: {chunk.partition}",
            )  # fmt: skip
            return
        with self._lanes.timeline.work("step", f"step: {chunk.partition}", len(buffers.record) + 2 * chunk.numel):
            self._lanes.declare(reads=[buffers.gradient], writes=[buffers.record, buffers.weights])
            self._run_kernel(chunk, submitted.request, decision, buffers)
        self._write_behind(chunk, buffers, lease, submitted.compute_done)

    def _wait_staged(self, step: ChunkStep) -> Lease | None:
        if not isinstance(step, StagedStep):
            return None
        # The reads do not exist before the lane that submits them has acquired a staging buffer.
        staged = self._lanes.wait(step.issued, Reason.READ_ISSUED)
        for read in staged.reads:
            # Without this the kernel works on what the staging buffer held before.
            self._lanes.wait(read, Reason.STATE_READ)
        return staged.lease

    def _run_kernel(self, chunk: StateChunk, request: StepRequest, decision: StepDecision, buffers: _Buffers) -> None:
        stored = ChunkState(
            chunk.state_tensors, buffers.record, buffers.weights, numel=chunk.numel, precision=self._precision
        )
        has_all = request.offloaded[chunk.pid] >= chunk.gradient.owners
        if not has_all and not stored.is_split and weights_are_staged(chunk.weights, chunk.state):
            # Entries that are not stepped keep their weights: those of the master, which never went away.
            stored.round_weights()
        start = chunk.gradient.chunk.start
        self._stepper.step(
            stored, typed(buffers.gradient[: chunk.numel * self._gradient_dtype.itemsize], self._gradient_dtype),
            self._runs(chunk, request), request.hypers, scale=decision.scale,
            first=self._first_numels[chunk.pid] + start, borders_from=start,
        )  # fmt: skip

    def _runs(self, chunk: StateChunk, request: StepRequest) -> list[Run]:
        """The parts of the chunk that are stepped: one for each parameter that has a gradient, in order."""
        gradient, offloaded = chunk.gradient, request.offloaded[chunk.pid]
        entries = self._partitions[chunk.pid].trainable.entries
        runs: list[Run] = []
        for position, segments in groupby(range(len(gradient.entries)), key=gradient.entries.tolist().__getitem__):
            if position in offloaded:
                entry, numbers = entries[position], list(segments)
                start, stop = int(gradient.starts[numbers[0]]), int(gradient.stops[numbers[-1]])
                num_steps = self._num_steps.get(entry.index, 0) + 1
                in_parameter = gradient.chunk.start + start - entry.start
                shape = tuple(entry.shape)
                runs.append(Run(start, stop, entry.group or 0, num_steps, entry.index, shape, in_parameter))
        return runs

    def _write_behind(self, chunk: StateChunk, buffers: _Buffers, lease: Lease | None, compute_done: Mark) -> None:
        """Submit the writes of new state and weights, and release the staging buffer to whoever waits for them."""
        pending: list[Future[Any]] = []
        if isinstance(chunk.state, DiskHome):
            pending.append(chunk.state.write(buffers.record, f"state write: {chunk.partition}"))
        if isinstance(chunk.weights, DiskHome):
            pending.append(chunk.weights.write(buffers.weights, f"weights write: {chunk.partition}"))
        elif chunk.weights.tier is Tier.DEVICE and weights_are_staged(chunk.weights, chunk.state):
            destination = chunk.weights.bytes[: chunk.numel * self._precision.dtype.itemsize]
            # Without this the copy overwrites weights that the last backward still reads.
            self._device.h2d.after(compute_done, Reason.SLOT_RELEASED)
            self._device.h2d.copy(
                destination, buffers.weights[: destination.numel()], f"weights h2d: {chunk.partition}"
            )
            pending.append(self._device.h2d.record().future)
        if lease is not None:
            lease.release(self._lanes.all_of(pending, f"staging buffer of {chunk.pid}") if pending else None)


def _buffers(chunk: StateChunk, lease: Lease | None) -> _Buffers:
    """Where the kernel works: in the homes that it can reach, else in the staging buffer."""
    homes = (chunk.state, chunk.gradient.home, chunk.weights)
    if lease is None:
        return _Buffers(*(home.bytes for home in homes))
    places = (chunk.layout.state, chunk.layout.gradient, chunk.layout.weights)
    return _Buffers(
        *(
            lease.bytes[place] if place.stop > place.start else home.bytes
            for home, place in zip(homes, places, strict=True)
        )
    )
