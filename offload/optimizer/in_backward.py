"""Steps in backward: a partition is stepped as soon as its gradient is complete and nothing uses its weights.

Owns: which backward of a step is the last, what was stepped in it, and what must still be true at `step()`.
Does not: find out that a gradient is complete (hooks.py) or step (pipeline.py).
Threads: the training thread and autograd's own, never two at once.

A reentrant checkpoint cannot be told from a second backward, so the second one raises.

Note [Step in backward]: such a step cannot be undone. It needs no norm (so no clipping and no loss scale), and its
options are those of the first gradient that was complete. If the options have changed when `step()` comes, if a
gradient was dropped or was not finite, or if backward ended by an exception, then part of the weights has been stepped
by a step that the user did not make: the session fails and says so.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from offload.errors import ConfigError, UnsupportedModelError
from offload.gradients.intake import GradientIntake
from offload.optimizer.pipeline import StepPipeline
from offload.optimizer.request import StepRequest
from offload.runtime import Runtime
from offload.weights.fetch import WeightFetcher

REMEDY = 'Use overlap="forward", which steps in step().'


class BackwardSteps:
    """Steps partitions in the last backward before `step()`."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        accumulate: int,
        snapshot: Callable[[], tuple[Any, ...]],
        intake: GradientIntake,
        pipeline: StepPipeline,
        fetcher: WeightFetcher,
    ) -> None:
        self._accumulate = accumulate
        self._snapshot = snapshot
        self._partitions = runtime.partitions
        self._intake = intake
        self._pipeline = pipeline
        self._fetcher = fetcher
        self._lanes = runtime.lanes
        self._num_backwards = 0
        """Since the last step."""
        self._hypers: tuple[Any, ...] | None = None
        self._stepped: dict[int, frozenset[int]] = {}
        """By partition, the entries that were stepped since the last `step()`."""

    @property
    def is_ahead(self) -> bool:
        """Backward has stepped what `step()` has not taken over yet."""
        return bool(self._stepped)

    def begin_backward(self) -> None:
        """A backward begins. Raises where it is one more than `accumulate` says, and part of the weights is stepped."""
        self._num_backwards += 1
        if self._stepped:
            raise self._failed(
                f"accumulate={self._accumulate}, but backward {self._num_backwards} came before step(): the weights "
                "were stepped in the one before it. Or a checkpoint is reentrant, and so a backward of its own: choose "
                "use_reentrant=False"
            )

    def complete(self, pid: int) -> None:
        """Every gradient of the partition has arrived, and nothing uses its weights: step it, if it is time."""
        partition = self._partitions[pid]
        if self._num_backwards < self._accumulate or pid in self._stepped or partition.frozen.entries:
            return
        if self._hypers is None:
            self._hypers = self._snapshot()
        offloaded = self._intake.offload_now(pid)
        self._pipeline.submit(
            StepRequest(
                order=[pid], in_norm=[pid], offloaded={pid: offloaded}, hypers=self._hypers, loss_scale=1.0,
                must_be_finite=True,
            )
        )  # fmt: skip
        self._stepped[pid] = frozenset(offloaded)
        self._intake.close(pid)
        self._fetcher.renew(pid)

    def check_use(self, pids: Sequence[int]) -> None:
        """Raise where a backward needs weights that it has already stepped: they are gone."""
        for pid in pids:
            if pid in self._stepped:
                raise UnsupportedModelError(
                    f"the weights of {self._partitions[pid].name!r} are needed again by the backward that has stepped "
                    f"them. {REMEDY}"
                )

    def settle(self, offloaded: Mapping[int, set[int]], hypers: tuple[Any, ...]) -> list[int]:
        """`step()`: the partitions that have been stepped; fails where Note [Step in backward] says so."""
        stepped, used = self._stepped, self._hypers
        self._forget()
        for pid, entries in stepped.items():
            if offloaded[pid] != entries:
                raise self._failed(
                    f"the gradient of {self._partitions[pid].name!r} was dropped or changed between backward and "
                    "step(), but backward has stepped it already"
                )
        if stepped and used != hypers:
            raise self._failed(f"options of the optimizer changed between backward and step(): {used} became {hypers}")
        return list(stepped)

    def abandon(self) -> None:
        """Backward ended by an exception."""
        if self._stepped:
            names = [self._partitions[pid].name for pid in self._stepped]
            self._failed(f"backward ended by an exception when it had stepped {len(names)} partitions ({names[0]}, …)")

    def _forget(self) -> None:
        self._num_backwards = 0
        self._hypers = None
        self._stepped = {}
        self._intake.reopen()

    def _failed(self, what: str) -> ConfigError:
        text = f"{what}. {REMEDY}"
        self._lanes.fail(ConfigError(text))
        return ConfigError(text)  # a second one: the failure of the lanes must hold no frames of the user's
