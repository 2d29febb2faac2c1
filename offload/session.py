"""A session: one model and its optimizer, offloaded.

Owns: the calls that a user makes.
Does not: make components or do the work of any of them (assembly.py).
Threads: the training thread; one that was dropped is closed in a thread of its own (open_sessions.py).
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from offload.assembly import Components, Subject, assemble, fill
from offload.checkpoint.background import SaveResult
from offload.checkpoint.format.export_hf import Exported
from offload.checkpoint.format.folder import check_folder
from offload.checkpoint.loads import LoadResult
from offload.checkpoint.signals import SignalRequest, SignalSave
from offload.concurrency.lanes import Reason
from offload.concurrency.timeline import Timeline
from offload.errors import ConfigError, SessionClosedError, UnsupportedOptimizerError
from offload.model.partitions import Partition
from offload.model.weak import weakly
from offload.open_sessions import close_all, close_dropped, closed, opened
from offload.optimizer.decision import StepResult
from offload.planning.disk_settings import DiskSettings
from offload.report import metrics
from offload.runtime import Runtime
from offload.storage.allocation import QueueOf
from offload.storage.state_tensors import StateTensors


class Session:
    """What `offload.enable` returns. A context manager; the model trains inside it.

    The model holds its session: it stays open though nobody keeps this object, until it is closed, nothing holds the
    model any more, or the interpreter exits.
    """

    def __init__(self, runtime: Runtime, subject: Subject, disk: DiskSettings, queue_of: QueueOf) -> None:
        self.model = subject.model
        self.optimizer = subject.optimizer
        self.plan = runtime.plan
        self._runtime = runtime
        self._components: Components | None = None
        """None before all are made, and once the session is closed."""
        self._is_closed = False
        self._ends = ExitStack()
        self._filled: list[Partition] = []
        """Partitions whose values are in their homes: what is handed back at the end."""
        self._unplanned: Sequence[int] = ()
        self._is_packing = False
        self._on_signal: list[SignalSave] = []
        self._disk_mode: str | None = None
        self.opened_in = threading.current_thread()
        self._pid = os.getpid()
        self._opened_by = _line_of_user()
        try:
            made = assemble(runtime, subject, disk, queue_of, self._ends, self._settle)
            self._components = made
            self._disk_mode = made.storage.disk_mode
            if made.optimizer_hooks is not None:
                self._unplanned = made.optimizer_hooks.unplanned_fetches
            fill(runtime, subject, made, self._filled)
            self._attach(made)
        except BaseException:
            self.close()  # the model is as it was
            raise
        opened(self, keeps=made.storage.swap)

    def __del__(self) -> None:
        if not self._is_closed and os.getpid() == self._pid:
            close_dropped(partial(self.close, give_back=False))

    def describe(self) -> str:
        """Its model, when it was opened and where: to find it again."""
        return f"the session of {type(self.model).__name__} ({self._opened_by})"

    def settle_lanes(self) -> None:
        """Wait until nothing is under way, whatever comes of it. Any thread."""
        with suppress(Exception):
            self._runtime.lanes.drain()

    def _attach(self, made: Components) -> None:
        if self.optimizer is not None and made.optimizer_hooks is not None:
            made.optimizer_hooks.attach(self._ends)
            self._ends.callback(self.optimizer.register_state_dict_post_hook(weakly(self._pack_state)).remove)
            self._ends.callback(self.optimizer.register_load_state_dict_pre_hook(weakly(self._refuse_state)).remove)
        # Without this the last writes of the masters would count as training.
        made.storage.wait_written()
        self._runtime.timeline.restart()
        self._runtime.ledger.restart_peaks()

    def _opened(self) -> Components:
        """The components. Raises SessionClosedError after the end."""
        if self._components is None:
            raise SessionClosedError("the session is closed; call offload.enable again.")
        return self._components

    # --------------------------------------------------------------------------------------------- training

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, with the loss multiplied by the loss scale in fp16."""
        self._opened().step_history.scaled(loss).backward()

    def step(self) -> StepResult:
        """`optimizer.step()`, with what it did."""
        hooks = self._opened().optimizer_hooks
        if self.optimizer is None or hooks is None:
            raise SessionClosedError("this session has no optimizer; pass one to offload.enable to train.")
        self.optimizer.step()
        if hooks.last_result is None:
            raise SessionClosedError(
                f"{type(self.optimizer).__name__}.step() ran without its hooks; call it on the optimizer that "
                "offload.enable was given."
            )
        return hooks.last_result

    def _settle(self) -> None:
        """Wait until no lane writes weights and none leases staging buffers. Raises after the end or a failure."""
        made = self._opened()
        self._runtime.lanes.check()
        self._wait_idle(made)

    def _wait_idle(self, made: Components) -> None:
        """As `_settle`, whatever the session's state."""
        lanes = self._runtime.lanes
        # Without this the reader sees weights of which half are stepped.
        lanes.wait(made.pipeline.last, Reason.STEP_DONE)
        made.pipeline.drop_ahead()
        for fetch in list(made.fetcher.last_fetch.values()):
            # Without this two threads lease from one ring.
            lanes.wait(fetch.issued, Reason.DRAIN)
        lanes.wait(self._runtime.device.h2d.record().future, Reason.DRAIN)

    # --------------------------------------------------------------------------------------- reading weights

    def gathered(self, module: nn.Module | None = None) -> AbstractContextManager[dict[str, Tensor]]:
        """fp32 master weights of `module`'s parameters (default: all) by name, on the host.

        An edit is taken over at the end of the context. Waits for the step in flight.
        """
        return self._opened().values.gathered(module or self.model)

    def gathered_gradients(self, module: nn.Module | None = None) -> dict[str, Tensor]:
        """Gradients of `module`'s parameters (default: all) by name, fp32 copies on the host, before clipping.

        Those that a backward has left since they were last dropped; a parameter without one is not in it.
        """
        return self._opened().values.gradients(module or self.model)

    def weights_sha256(self) -> str:
        """SHA-256 of the working weights (16 bit or fp32), in parameter order."""
        return self._opened().values.sha256()

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
        self._settle()
        return self._opened().saves.save(Path(path), step=step, extra=extra, keep=keep, wait=wait)

    def save_on_signal(
        self, number: int, path: str | Path, *, extra: Callable[[], Mapping[str, Any]] = dict, keep: int | None = None
    ) -> None:
        """On signal `number` (signal.SIGTERM), save to `path` at the end of the running step; then let it act.

        `extra`: called then, for what `save` calls so. The action is what it was before this call: a handler is called,
        and the default ends the process by the signal. Among ranks all save and act that have asked for it, as soon as
        one gets it: all have to ask. Where the process is killed before the save is over (a grace period shorter than
        a step and a save), the earlier checkpoints stay whole. One that comes after the last step acts at `close`. Main
        thread.
        """
        if self.optimizer is None or self._opened().optimizer_hooks is None:
            raise ConfigError(
                "save_on_signal saves at the end of a step, and this session has no optimizer that steps."
            )
        check_folder(Path(path), name="path")
        if not self._on_signal:
            self._ends.callback(self.optimizer.register_step_post_hook(weakly(self._stepped)).remove)
        request = SignalRequest.catch(number)
        self._on_signal.append(SignalSave(request=request, path=Path(path), extra=extra, keep=keep))

    def _stepped(self, *_: Any) -> None:
        """Save and end where a signal has asked for it, on any rank."""
        hooks = self._opened().optimizer_hooks
        if hooks is None or hooks.is_under_way:
            return
        here = np.array([save.request.requested for save in self._on_signal], np.uint8)
        for save, is_asked in zip(self._on_signal, self._runtime.ranks.unite(here, "save on a signal"), strict=True):
            if is_asked:
                self.save(save.path, extra=save.extra(), keep=save.keep)
                save.request.requested = False
                if save.request.is_fatal:
                    close_all(give_back=False)
                save.request.deliver()
                return

    def load(self, path: str | Path, *, strict: bool = True, on_corrupt: str = "raise") -> LoadResult:
        """Go on from a checkpoint, the newest in a folder, or weights of Hugging Face or torch. Drops gradients.

        `strict`: refuse one of another optimizer or other groups; False keeps the options that the groups have.
        `on_corrupt`: where it is damaged, "raise", or go on from the newest "previous" one that is whole, with a
        warning that names the damaged one. Whatever is refused leaves the session as it was.
        """
        self._settle()
        self._opened().hooks.recover()
        return self._opened().loads.load(Path(path), strict=strict, on_corrupt=on_corrupt)

    def export(self, out: str | Path, format: str = "hf", *, dtype: str | None = None) -> Exported:
        """Write the model to the folder `out`: "hf" (safetensors), "dcp" (torch.distributed.checkpoint; with moments).

        `dtype`: "fp32", "bf16" or "fp16"; None keeps that of each parameter before the session.
        """
        self._settle()
        return self._opened().exports.export(Path(out), to=format, dtype=dtype)

    def state_dict(self, *, optimizer: bool = True) -> dict[str, Any]:
        """`model` and `optimizer` as torch's own `state_dict` would be outside the session. For small models."""
        self._settle()
        self._is_packing = True
        try:
            return self._opened().exports.state_dict(with_optimizer=optimizer)
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
        if self._components is not None and self._runtime.lanes.failure is None:
            self._wait_idle(self._components)
            self._components.storage.wait_written()
        return metrics.collect(
            self.timeline, self._runtime.ledger, self.plan, unplanned_fetches=self._unplanned, disk_mode=self._disk_mode
        )

    def report(self) -> str:
        """Bytes, rates and waits by lane, and peaks against budgets, as text."""
        return metrics.as_text(self.metrics(), self.timeline)

    def state_tensors(self, partition_id: int) -> StateTensors:
        """What is kept of each trainable parameter of a partition, in addition to its working weights."""
        return self._opened().storage.state_tensors[partition_id]

    @property
    def timeline(self) -> Timeline:
        """Spans, waits and counters since training began."""
        return self._runtime.timeline

    # ----------------------------------------------------------------------------------------------- ending

    def __enter__(self) -> Self:
        self._opened()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        ranks = self._runtime.ranks
        if error is not None:
            ranks.note_failure(f"{type(error).__name__}: {error}")
        # Among ranks all must take part in handing parameters back, and after an exception nobody knows where the
        # others are.
        self.close(give_back=error is None or not ranks.is_sharded)

    def close(self, *, give_back: bool = True) -> None:
        """End the session: parameters back on their original device in their original dtype, swap files removed.

        `give_back=False`: leave placeholders, for models that do not fit anywhere else. Idempotent. Raises the error of
        a save in the background that nobody has seen, once all is handed back.
        """
        if self._is_closed:
            return
        self._is_closed = True
        closed(self)
        unsaved = None
        try:
            if self._components is not None:
                unsaved = self._hand_back(self._components, give_back and self._runtime.lanes.failure is None)
        finally:
            self._components = None  # what they hold of regions must be gone before these are unmapped
            with ExitStack() as last:
                for save in self._on_signal:
                    last.callback(save.request.end)  # it may end the process
                with self._ends:
                    self._runtime.lanes.close()
        if unsaved is not None and sys.exception() is None:  # it would hide what ended the run
            raise unsaved

    def _hand_back(self, made: Components, give_back: bool) -> BaseException | None:
        """Remove the hooks, and hand parameters and state back; returns the error of a save that nobody has seen."""
        unsaved = made.saves.end()
        made.hooks.detach()
        made.values.detach()
        made.intake.detach()
        if give_back:
            made.hooks.recover()
            self._wait_idle(made)
        for slot in made.slots:
            slot.leave()  # its memory goes now, or as soon as nothing points there any more
        if give_back:
            made.torch_state.hand_back(self._filled)
        return unsaved


def _line_of_user() -> str:
    """When and where the user opens a session: the innermost line outside this package."""
    here = str(Path(__file__).parent)
    frames = (frame for frame, _ in traceback.walk_stack(None) if not frame.f_code.co_filename.startswith(here))
    frame = next(frames, None)
    where = "" if frame is None else f" at {frame.f_code.co_filename}:{frame.f_lineno}"
    return f"opened {time.strftime('%H:%M:%S')}{where}"
