"""A session: one model and its optimizer, offloaded.

Owns: the calls that a user makes, and the order of a step.
Does not: make the parts or do the work of any of them (parts.py).
Threads: the training thread.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from offload.assembly import Given, Parts
from offload.checkpoint.persistence import Exported, LoadResult, SaveResult
from offload.concurrency.timeline import Timeline
from offload.errors import SessionClosedError, UnsupportedOptimizerError
from offload.model.checks import check_still_frozen, frozen_in_groups
from offload.optimizer.decision import StepResult
from offload.report import metrics
from offload.storage.state_tensors import StateTensors

RESIDENT: Final = "weights at home"


class Session:
    """What `offload.enable` returns. A context manager; the model trains inside it."""

    def __init__(self, given: Given) -> None:
        self.model = given.model
        self.optimizer = given.optimizer
        self.plan = given.plan
        self._lanes = given.lanes
        self._hooked: list[Any] = []
        self._num_begun = 0
        """Calls of the optimizer's step that have begun: a class of the user's may call the step of its parent."""
        self._last_result: StepResult | None = None
        self._unplanned: list[int] = []
        self._unplanned_before = 0
        self._is_packing = False
        self._frozen = frozen_in_groups(given.optimizer, given.partitions)
        self._parts = Parts(given)
        try:
            self._parts.compose()
            self._parts.fill()
            self._attach()
        except BaseException:
            self.close()  # the model is as it was
            raise

    def _attach(self) -> None:
        if self.optimizer is not None:
            self._hooked.append(self.optimizer.register_step_pre_hook(self._before_step))
            self._hooked.append(self.optimizer.register_step_post_hook(self._after_step))
            self._hooked.append(self.optimizer.register_state_dict_post_hook(self._pack_state))
            self._hooked.append(self.optimizer.register_load_state_dict_pre_hook(self._refuse_state))
        # Without this the last writes of the masters would count as training.
        self._parts.storage.wait_written()
        self._lanes.timeline.restart()
        self._parts.ledger.restart_peaks()

    # --------------------------------------------------------------------------------------------- training

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, with the loss multiplied by the loss scale in fp16."""
        self._parts.check_open()
        self._parts.step_history.scaled(loss).backward()

    def step(self) -> StepResult:
        """`optimizer.step()`, with what it did."""
        self._parts.check_open()
        if self.optimizer is None:
            raise SessionClosedError("this session has no optimizer; pass one to offload.enable to train.")
        self.optimizer.step()
        assert self._last_result is not None
        return self._last_result

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        # torch hands over the arguments of the unbound method: the optimizer itself comes first.
        if self._num_begun and not self._parts.intake.handed_out:
            self._num_begun += 1
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
        self._num_begun = 1
        return changed

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._num_begun -= 1
        if self._num_begun:
            return
        self._parts.intake.hand_out()
        if self._parts.given.config.overlap == "off":
            self._parts.wait_idle()

    def _step(self) -> None:
        parts, fetcher, intake = self._parts, self._parts.fetcher, self._parts.intake
        parts.check_open()
        self._lanes.check()
        parts.hooks.recover()
        parts.step_history.absorb()
        parts.step_history.check_scaled()
        check_still_frozen(self._frozen)
        assert self.optimizer is not None
        offloaded = dict(enumerate(intake.collect_for_step()))
        hypers = parts.given.kind.snapshot(self.optimizer)
        stepped = parts.in_backward.settle(offloaded, hypers) if parts.in_backward is not None else []
        in_norm = [pid for pid in parts.forward_order() if offloaded[pid]]
        covered = [pid for pid in in_norm if pid not in stepped]
        result, published, consumed = parts.pipeline.submit(
            order=covered, in_norm=in_norm, offloaded=offloaded, hypers=hypers, all_offloaded=intake.last_offload,
            loss_scale=parts.step_history.loss_scale, last_fetch=fetcher.last_fetch, strict=bool(stepped),
        )  # fmt: skip
        for pid in covered:
            parts.given.partitions[pid].version += 1
            fetcher.publish(pid, published[pid], consumed[pid])
            intake.consumed(pid, consumed[pid])
        for pid in stepped:
            # The norm still reads their sums: no gradient offload before it.
            intake.consumed(pid, [result.in_norm] * len(parts.pipeline.chunks[pid]))
        fetcher.step(covered)
        self._last_result = result
        parts.step_history.submitted(result)
        now = fetcher.schedule.unplanned_fetches
        self._unplanned.append(now - self._unplanned_before)
        self._unplanned_before = now

    # --------------------------------------------------------------------------------------- reading weights

    def gathered(self, module: nn.Module | None = None) -> AbstractContextManager[dict[str, Tensor]]:
        """fp32 master weights of `module`'s parameters (default: all) by name, on the host.

        An edit of a trainable parameter is taken over at the end of the context. Waits for the step in flight.
        """
        self._parts.check_open()
        return self._parts.values.gathered(module or self.model)

    def gathered_gradients(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """Gradients of `module`'s parameters (default: all) by name, fp32 copies on the host, before clipping.

        Those that a backward has left since they were last dropped; a parameter without one is not in it.
        """
        self._parts.check_open()
        return self._parts.values.gradients(module or self.model)

    def weights_sha256(self) -> str:
        """SHA-256 of the working weights (16 bit or fp32), in parameter order."""
        self._parts.check_open()
        return self._parts.values.sha256()

    # --------------------------------------------------------------------------------------- save and load

    def save(
        self, path: str | Path, *, step: int | None = None, extra: Mapping[str, Any] | None = None,
        keep: int | None = None, wait: bool = True,
    ) -> SaveResult:  # fmt: skip
        """A checkpoint in the folder `path`, named by `step` (default: steps taken). An error keeps what was there.

        Weights, moments, options, random states and `extra` (JSON and tensors); no gradients. `keep`: how many stay.
        `wait=False`: go on training meanwhile, where the disk can clone files or the host budget has room for a copy;
        else as with True. Its result tells when it is durable; an error that nobody read there, the next save or close.
        """
        self._parts.settle()
        return self._parts.persistence.save(Path(path), step=step, extra=extra, keep=keep, wait=wait)

    def load(self, path: str | Path, *, strict: bool = True) -> LoadResult:
        """Go on from a checkpoint, the newest in a folder, or weights of Hugging Face or torch. Drops gradients.

        `strict`: refuse one of another optimizer or other groups; False keeps the options that the groups have.
        Whatever is refused leaves the session as it was.
        """
        self._parts.settle()
        self._parts.hooks.recover()
        return self._parts.persistence.load(Path(path), strict=strict)

    def export(self, out: str | Path, format: str = "hf", *, dtype: str | None = None) -> Exported:
        """Write the model to the folder `out`: "hf" (safetensors), "dcp" (torch.distributed.checkpoint; with moments).

        `dtype`: "fp32", "bf16" or "fp16"; None keeps that of each parameter before the session.
        """
        self._parts.settle()
        return self._parts.persistence.export(Path(out), to=format, dtype=dtype)

    def state_dict(self, *, optimizer: bool = True) -> dict[str, Any]:
        """`model` and `optimizer` as torch's own `state_dict` would be outside the session. For small models."""
        self._parts.settle()
        self._is_packing = True
        try:
            return self._parts.persistence.state_dict(with_optimizer=optimizer)
        finally:
            self._is_packing = False

    def _pack_state(self, optimizer: torch.optim.Optimizer, packed: dict[str, Any]) -> None:
        """The user asks the optimizer itself: it holds no moments here."""
        if not self._is_packing:
            packed |= self.state_dict()["optimizer"]

    def _refuse_state(self, optimizer: torch.optim.Optimizer, packed: Mapping[str, Any]) -> None:
        if packed["state"]:
            raise UnsupportedOptimizerError(
                "optimizer.load_state_dict was called while the session holds the optimizer's moments, and would not "
                "reach them. Call it before offload.enable, or session.load with a checkpoint."
            )

    # -------------------------------------------------------------------------------------------- reporting

    def metrics(self) -> dict[str, Any]:
        """Numbers since training began: bytes and seconds by lane, peaks against budgets, homes.

        Waits for the step in flight and its writes, so that its bytes count, where the session is open and has not
        failed.
        """
        if not self._parts.closed and self._lanes.failure is None:
            self._parts.wait_idle()
            self._parts.storage.wait_written()
        return metrics.collect(
            self._lanes.timeline, self._parts.ledger, self.plan, unplanned_fetches=self._unplanned,
            disk_mode=self._parts.storage.disk_mode,
        )  # fmt: skip

    def report(self) -> str:
        """Bytes, rates and waits by lane, and peaks against budgets, as text."""
        return metrics.as_text(self.metrics(), self._lanes.timeline)

    def state_state_tensors(self, partition_id: int) -> StateTensors:
        """What is kept of each trainable parameter of a partition, beside its working weights."""
        return self._parts.storage.state_tensors[partition_id]

    @property
    def timeline(self) -> Timeline:
        """Spans, waits and counters since training began."""
        return self._lanes.timeline

    # ----------------------------------------------------------------------------------------------- ending

    def __enter__(self) -> Self:
        self._parts.check_open()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None and self._parts.given.ranks is not None:
            self._parts.given.ranks.note_failure(f"{type(error).__name__}: {error}")
        # Among ranks all must take part in giving back, and who knows where the others are after an exception.
        self.close(give_back=error is None or self._parts.given.ranks is None)

    def close(self, *, give_back: bool = True) -> None:
        """End the session: parameters back on their original device in their original dtype, swap files removed.

        `give_back=False`: leave placeholders, for models that do not fit anywhere else. Idempotent. Raises the error of
        a save beside training that nobody has seen, once all is given back.
        """
        if self._parts.closed:
            return
        unsaved = None
        try:
            for handle in self._hooked:
                handle.remove()
            unsaved = self._parts.end(give_back=give_back and self._lanes.failure is None)
        finally:
            self._parts.release()
        if unsaved is not None and sys.exception() is None:  # it would hide what ended the run
            raise unsaved
