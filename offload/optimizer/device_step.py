"""The step of one chunk on an accelerator: its gradient, state and weights are all resident there.

Owns: the pass over a resident chunk: unscaling, Adam, and the rounding of the new weights.
Does not: decide what is resident (planning/on_device.py), the order of chunks (step_queue.py), or step on a device
that the host's kernels reach (kernel_step.py).
Threads: the step lane issues; what is issued runs on the h2d stream, in the background of the model's stream.

Note [Device step]: torch's fused Adam is one pass over gradient, state and master. It takes fp32 gradients and would
write unscaled ones back, so they are scaled into a workspace, which then serves the rounding. A chunk is small enough
for the workspace to stay in the device's cache: about 70 bytes an element in all, so 15 ms for 10^9 parameters at
4.8 TB/s (computed; to issue their 477 chunks takes the step lane 20 ms), where the link alone would take 80 ms (2 bytes
each way at 50 GB/s). The h2d stream, as new weights are what it carries: all that waits for weights waits for it
already, and the weights of these partitions, which it need not carry, would have taken it 40 ms.

Note [Device arithmetic]: all in fp32 with constants in fp64, like the host's kernel, yet not operation by operation.
After one step from equal state: exp_avg within 2 ulps of the larger of itself and the gradient, exp_avg_sq within 8 of
the larger of itself and the square that it takes in, the master within 2 of its own and 8 of the largest update that
the new denominator allows (for a gradient to which decay by L2 is added, as if the two never cancelled). torch's form
for the CPU has the host kernel's bits; its form for CUDA computes in fp64 and rounds each result: the tests
(tests/training/test_device_state.py) hold both, the latter written out, to these bounds. Weights are the
master rounded as everywhere: bf16 ties away from zero, so a checkpoint, which keeps masters, gives back the same ones.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple, cast

import torch
from torch import Tensor

from offload.concurrency.lanes import Lanes, Reason
from offload.config import Precision
from offload.device.protocol import CollectiveQueue, Device, Mark
from offload.gradients.on_device import OFFLOAD_WORKSPACE_ITEMSIZE
from offload.memory.region import typed
from offload.optimizer.hyper import AdamHyper
from offload.optimizer.kernel_step import Run, joined
from offload.storage.state_tensors import StateTensors, state_tensors_in

STEP_WORKSPACE_ITEMSIZE: Final = 4
"""Bytes of workspace for each element of the largest chunk: its gradient in fp32."""

DEVICE_WORKSPACE_ITEMSIZE: Final = OFFLOAD_WORKSPACE_ITEMSIZE + STEP_WORKSPACE_ITEMSIZE
"""The same for gradient offload and stepping, which run on two streams."""

MOMENTS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class _RunTensors(NamedTuple):
    """The elements of a run."""

    gradient: Tensor
    weights: Tensor
    master: Tensor
    moments: list[Tensor]


class _RunStep(NamedTuple):
    """The step that a run takes, and its part of the workspace."""

    num_steps: int
    tensors: _RunTensors
    workspace: Tensor


class DeviceStepper:
    """Steps resident chunks by Adam or AdamW with fp32 state and a plain master."""

    def __init__(
        self, *, workspace: Tensor, precision: Precision, gradient_home: Precision, device: Device, lanes: Lanes
    ) -> None:
        self._workspace = typed(workspace, torch.float32)
        self._precision = precision
        self._gradient_dtype = gradient_home.dtype
        self._torch_device = device.torch_device
        self._queue = cast(CollectiveQueue, device.h2d)  # a stream of its own, which runs anything
        self._lanes = lanes
        self._tensors: dict[tuple[int, int, int], _RunTensors] = {}
        """By address of the record, start and stop: made once, as a view costs as much to make as a kernel to issue."""
        self._scalars: dict[float, Tensor] = {}

    def step(
        self,
        state_tensors: StateTensors,
        buffers: tuple[Tensor, Tensor, Tensor],
        runs: Sequence[Run],
        hypers: Sequence[AdamHyper],
        *,
        numel: int,
        scale: float,
        compute_done: Mark,
        name: str,
    ) -> Mark:
        """Issue the step of `runs` of one chunk; `buffers`: its state record, gradient and weights (bytes).

        `compute_done`: after the last use of the old weights. Returns the point where the new ones are there.
        """
        # Without this the kernel overwrites weights that the last pass over the model still reads.
        self._queue.after(compute_done, Reason.SLOT_RELEASED)
        work = partial(self._run, state_tensors, buffers, joined(runs), hypers, numel, scale)
        self._queue.run(work, name, 0)  # nothing crosses the link
        return self._queue.record()

    # ------------------------------------------------------------------------------------------- on the stream

    def _run(
        self,
        state_tensors: StateTensors,
        buffers: tuple[Tensor, Tensor, Tensor],
        runs: Sequence[tuple[int, int, int, int]],
        hypers: Sequence[AdamHyper],
        numel: int,
        scale: float,
    ) -> None:
        record, gradient, weights = buffers
        self._lanes.declare(reads=[gradient], writes=[record, weights, self._workspace])
        by_group: dict[int, list[_RunStep]] = {}
        for start, stop, group, num_steps in runs:
            tensors = self._tensors_of(state_tensors, buffers, numel, start, stop)
            by_group.setdefault(group, []).append(_RunStep(num_steps, tensors, self._workspace[start:stop]))
        for group, run_steps in by_group.items():
            self._adam(hypers[group], run_steps, scale)
            for run in run_steps:
                self._round(run.tensors.master, run.tensors.weights, run.workspace)

    def _adam(self, hyper: AdamHyper, run_steps: Sequence[_RunStep], scale: float) -> None:
        """Runs of one group. A sign instead of `maximize`: decay by L2 is added after it, as in torch."""
        scale = -scale if hyper.maximize else scale
        gradients = [run.tensors.gradient for run in run_steps]
        if scale != 1.0 or self._gradient_dtype is not torch.float32:
            for run in run_steps:
                # A tensor with a dimension promotes 16-bit gradients: the product is rounded once, in fp32.
                torch.mul(run.tensors.gradient, self._scalar(scale), out=run.workspace)
            gradients = [run.workspace for run in run_steps]
        step = torch._fused_adamw_ if hyper.decoupled else torch._fused_adam_
        exp_avgs, exp_avg_sqs, *largest = (
            [run.tensors.moments[i] for run in run_steps] for i in range(len(hyper.state_tensors))
        )
        step(
            [run.tensors.master for run in run_steps], gradients, exp_avgs, exp_avg_sqs, largest[0] if largest else [],
            [self._scalar(float(run.num_steps)) for run in run_steps],
            lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2, weight_decay=hyper.weight_decay, eps=hyper.eps,
            amsgrad=hyper.amsgrad, maximize=False,
        )  # fmt: skip

    def _round(self, master: Tensor, weights: Tensor, workspace: Tensor) -> None:
        """Weights from the master: to nearest; ties of bf16 away from zero, those of fp16 to even."""
        if self._precision is Precision.BF16:
            # Where the first bit that is lost is set, the last one is set too: then no tie is left, and torch's
            # rounding to even goes the way of the kernels. Infinities and NaN stay what they are.
            bits, rounded = master.view(torch.int32), workspace.view(torch.int32)
            torch.bitwise_right_shift(bits, 15, out=rounded)
            rounded.bitwise_and_(1).bitwise_or_(bits)
            master = workspace
        weights.copy_(master)

    def _tensors_of(
        self, state_tensors: StateTensors, buffers: tuple[Tensor, Tensor, Tensor], numel: int, start: int, stop: int
    ) -> _RunTensors:
        record, gradient, weights = buffers
        key = (record.data_ptr(), start, stop)
        tensors = self._tensors.get(key)
        if tensors is None:
            arrays = state_tensors_in(state_tensors, record, numel)
            tensors = self._tensors[key] = _RunTensors(
                typed(gradient[: numel * self._gradient_dtype.itemsize], self._gradient_dtype)[start:stop],
                typed(weights[: numel * self._precision.dtype.itemsize], self._precision.dtype)[start:stop],
                arrays["master"][start:stop],
                [arrays[name][start:stop] for name in MOMENTS if name in arrays],
            )
        return tensors

    def _scalar(self, value: float) -> Tensor:
        """(1,) fp32 on the device. Made by a kernel, not by a copy for which the host would wait."""
        if value not in self._scalars:
            if len(self._scalars) == 16:  # of this step and those before; the stream orders what reuses their memory
                self._scalars.clear()
            self._scalars[value] = torch.full((1,), value, dtype=torch.float32, device=self._torch_device)
        return self._scalars[value]
