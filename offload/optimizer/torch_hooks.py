"""`optimizer.step()` as the step of a session: torch's hooks around it, and what they submit.

Owns: closures and nested calls of `step`, the order in which a step is collected and submitted, its newest result.
Does not: step (pipeline.py), step in backward (in_backward.py) or look at results (history.py).
Threads: the training thread.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from offload.errors import SessionClosedError
from offload.gradients.intake import GradientIntake
from offload.model.checks import check_still_frozen, frozen_in_groups
from offload.model.weak import weakly
from offload.optimizer.decision import StepResult
from offload.optimizer.history import StepHistory
from offload.optimizer.in_backward import BackwardSteps
from offload.optimizer.pipeline import StepPipeline
from offload.optimizer.request import StepRequest
from offload.runtime import Runtime
from offload.weights.fetch import WeightFetcher


class StepSubmission:
    """What `step()` does in the training thread: collect gradients and options, and submit."""

    def __init__(
        self,
        *,
        snapshot: Callable[[], tuple[Any, ...]],
        intake: GradientIntake,
        fetcher: WeightFetcher,
        pipeline: StepPipeline,
        in_backward: BackwardSteps | None,
        history: StepHistory,
    ) -> None:
        """`snapshot`: the options of every group now. `in_backward`: None where backward never steps."""
        self._snapshot = snapshot
        self._intake = intake
        self._fetcher = fetcher
        self._pipeline = pipeline
        self._in_backward = in_backward
        self._history = history
        self.unplanned_fetches: list[int] = []
        """Of every step so far."""

    def submit(self) -> StepResult:
        """Submit one step over all gradients that there are."""
        self._history.absorb()
        self._history.check_scaled()
        offloaded = dict(enumerate(self._intake.collect_for_step()))
        hypers = self._snapshot()
        stepped = self._in_backward.settle(offloaded, hypers) if self._in_backward is not None else []
        in_norm = [pid for pid in self._pipeline.forward_order() if offloaded[pid]]
        order = [pid for pid in in_norm if pid not in stepped]
        result = self._pipeline.submit(
            StepRequest(
                order=order, in_norm=in_norm, offloaded=offloaded, hypers=hypers,
                loss_scale=self._history.loss_scale, must_be_finite=bool(stepped),
            )
        )  # fmt: skip
        self._keep_sums(stepped, result)
        self._fetcher.step(order)
        self._history.submitted(result)
        num_unplanned = self._fetcher.schedule.unplanned_fetches
        self.unplanned_fetches.append(num_unplanned - sum(self.unplanned_fetches))
        return result

    def _keep_sums(self, stepped: Sequence[int], result: StepResult) -> None:
        """The norm still reads the sums of what backward has stepped: no gradient may be stored there before it."""
        for pid in stepped:
            self._intake.consumed(pid, [result.decided] * len(self._pipeline.chunks[pid]))


class OptimizerHooks:
    """Makes a call of the user's `optimizer.step()` a step of the session."""

    def __init__(
        self,
        runtime: Runtime,
        optimizer: torch.optim.Optimizer,
        submission: StepSubmission,
        *,
        intake: GradientIntake,
        recover: Callable[[], None],
        settle: Callable[[], None],
    ) -> None:
        """`recover`: ends the uses of a forward that raised. `settle`: waits until no lane writes weights."""
        self._optimizer = optimizer
        self._submission = submission
        self._intake = intake
        self._recover = recover
        self._settle = settle
        self._lanes = runtime.lanes
        self._waits_for_step = runtime.config.overlap == "off"
        self._frozen = frozen_in_groups(optimizer, runtime.partitions)
        self._is_attached = False
        self._num_calls = 0
        """Calls of `step` under way: a class of the user's may call the step of its parent."""
        self.last_result: StepResult | None = None

    @property
    def unplanned_fetches(self) -> Sequence[int]:
        """Of every step so far, fetches that the recorded order did not have."""
        return self._submission.unplanned_fetches

    @property
    def is_under_way(self) -> bool:
        """A call of `step` has not returned yet."""
        return self._num_calls > 0

    def attach(self, ends: ExitStack) -> None:
        """From now on `step()` is the session's, until `ends` is closed."""
        self._is_attached = True
        ends.callback(self._detach)
        ends.callback(self._optimizer.register_step_pre_hook(weakly(self._before_step)).remove)
        ends.callback(self._optimizer.register_step_post_hook(weakly(self._after_step)).remove)

    def _detach(self) -> None:
        self._is_attached = False

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        # torch passes the arguments of the unbound method: the optimizer itself comes first.
        if self._num_calls and not self._intake.has_placeholders:
            self._num_calls += 1
            return None
        positional = len(args) > 1
        closure: Callable[[], Any] | None = args[1] if positional else kwargs.get("closure")
        changed = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

            def evaluated() -> Any:
                return loss  # torch's own step calls it once more, for its return value

            changed = ((args[0], evaluated), kwargs) if positional else (args, kwargs | {"closure": evaluated})
        self._step()
        self._num_calls = 1
        return changed

    def _step(self) -> None:
        if not self._is_attached:
            raise SessionClosedError("the session was closed in a closure of step(); call offload.enable again.")
        self._lanes.check()
        self._recover()
        check_still_frozen(self._frozen)
        self.last_result = self._submission.submit()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._num_calls -= 1
        if self._num_calls:
            return
        self._intake.attach_placeholders()
        if self._waits_for_step:
            self._settle()
