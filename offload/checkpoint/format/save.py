"""Saving: the steps that every rank takes, and the future of a checkpoint that will survive a power cut.

Owns: the order of a save, the agreement of the ranks, removal of what a failed save wrote, retention.
Does not: read the state of training (its StateSource does) or decide in which thread it runs.
Threads: a job is made by the training thread, which thereby freezes user data; `run` may be called by another one.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from offload.checkpoint.format import folder as folders
from offload.checkpoint.format import manifest as manifests
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.manifest import Fields, Manifest, StoredFile, StoredRange
from offload.checkpoint.format.state import WEIGHTS, Item, Kind, Run, StateSource, StateTensor
from offload.checkpoint.format.user_data import encode
from offload.checkpoint.format.writer import FILE_BYTES, PartWriter, check_items
from offload.concurrency.futures import Future
from offload.errors import ConfigError, OffloadError
from offload.ranks.protocol import TextExchange
from offload.ranks.single import SINGLE_RANK

log = logging.getLogger("offload")

EXTRA_PREFIX: Final = ".extra."
"""No parameter's name starts with a dot, so tensors of user data cannot meet one."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is on the disk."""

    folder: Path
    num_bytes: int
    """Of this rank's files."""
    removed: tuple[str, ...]
    """Older checkpoints, beyond the number of `keep`."""


@dataclass(frozen=True, slots=True)
class Extras:
    """What is saved besides the state: JSON and tensors."""

    user: Mapping[str, Any] = field(default_factory=dict)
    """The user's dictionary; that of rank 0 is saved."""
    of_rank: Mapping[str, Any] = field(default_factory=dict)
    """What each rank has for itself, as random states."""


NO_EXTRAS: Final = Extras()


class CheckpointJob:
    """One save of one rank. Whatever is wrong with it raises here, before a byte is written.

    `keep`: this many complete checkpoints stay, the newest ones; None keeps all.
    """

    def __init__(
        self,
        root: Path,
        source: StateSource,
        *,
        step: int,
        extras: Extras = NO_EXTRAS,
        keep: int | None = None,
        ranks: TextExchange = SINGLE_RANK,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        if keep is not None and (type(keep) is not int or keep < 1):
            raise ConfigError(f"keep={keep!r}: expected a number of checkpoints, at least 1, or None to keep all.")
        self._root = root.absolute()  # `run` may come after a change of folder
        self._step = step
        self._keep = keep
        self._ranks = ranks
        self._file_bytes = file_bytes
        self._error: BaseException | None = None
        rank = self._ranks.rank
        self._extra, user = encode(dict(extras.user), name="extra")
        self._rank_extra, own = encode(dict(extras.of_rank), name="rank_extra")
        named = {f"user.{number}": tensor for number, tensor in enumerate(user if rank == 0 else ())}
        named |= {f"{rank}.{number}": tensor for number, tensor in enumerate(own)}
        self._source = _WithExtra(source, {f"{EXTRA_PREFIX}{name}": tensor for name, tensor in named.items()})
        check_items(self._source.items())
        self.durable: Future[Saved] = Future(f"checkpoint of step {step}")
        """Resolves once `run` has ended: with what is on the disk, or with the error."""

    def run(self, afterwards: Callable[[], None] | None = None) -> Saved:
        """Save, do `afterwards` however it ended, then settle `durable`.

        After an error the folder is as it was, and training can go on.
        """
        try:
            with ExitStack() as stack:
                stack.callback(afterwards or _nothing)
                saved = self._run()
        except BaseException as error:
            self.durable.fail(error)
            raise
        self.durable.resolve(saved)
        return saved

    def _run(self) -> Saved:
        first = self._ranks.rank == 0
        with ExitStack() as stack:
            saving = self._begin(stack, first)
            writer, part = self._write_part(saving)
            parts = self._agree(part)
            outcome = "{}"
            if first:
                outcome = self._attempt(lambda: self._publish(saving, parts))
            result = self._agree(outcome)[0]
        return Saved(self._root / result["folder"], writer.num_bytes if writer else 0, tuple(result["removed"]))

    def _begin(self, stack: ExitStack, first: bool) -> Path:
        def make() -> dict[str, Any]:
            stack.enter_context(folders.locked(self._root))
            saving = folders.begin(self._root, self._step)
            stack.callback(shutil.rmtree, saving, ignore_errors=True)  # once published it is no longer there
            return {"saving": saving.name}

        outcome = self._attempt(make) if first else "{}"
        name: str = self._agree(outcome)[0]["saving"]
        return self._root / name

    def _write_part(self, saving: Path) -> tuple[PartWriter | None, str]:
        made: list[PartWriter] = []

        def write() -> dict[str, Any]:
            made.append(PartWriter(saving, self._source, rank=self._ranks.rank, file_bytes=self._file_bytes))
            files, ranges = made[0].write()
            return {
                "files": [manifests.file_fields(file) for file in files],
                "pieces": [manifests.range_fields(stored) for stored in ranges],
                "items": [manifests.item_fields(item) for item in self._source.items()],
                "rank_extra": self._rank_extra,
            }

        outcome = self._attempt(write)
        return (made[0] if made else None), outcome

    def _publish(self, saving: Path, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        items: dict[str, Item] = {}
        files: list[StoredFile] = []
        ranges: list[StoredRange] = []
        for rank, part in enumerate(parts):
            fields = Fields(part, f"part of rank {rank}")
            for item in map(manifests.parse_item, fields.each("items")):
                if items.setdefault(item.name, item) != item:
                    raise CheckpointError(f"rank {rank} has {item}, another rank has {items[item.name]}.")
            files += map(manifests.parse_file, fields.each("files"))
            ranges += map(manifests.parse_range, fields.each("pieces"))
        whole = Manifest(
            step=self._step,
            world_size=self._ranks.world_size,
            files=tuple(files),
            items=items,
            ranges=tuple(ranges),
            extra=self._extra,
            rank_extra=tuple(part["rank_extra"] for part in parts),
        )
        folders.write_synced(saving / folders.MANIFEST, manifests.to_bytes(whole))
        final = folders.publish(self._root, saving, self._step)
        return {"folder": final.name, "removed": self._retain()}

    def _retain(self) -> list[str]:
        if self._keep is None:
            return []
        try:
            return folders.retain(self._root, self._keep)
        except OffloadError as error:  # the new checkpoint is complete: that old ones stay must not make it a failure
            log.warning("old checkpoints in %s could not be removed: %s", self._root, error)
            return []

    def _attempt(self, work: Callable[[], dict[str, Any]]) -> str:
        """The outcome of this rank's share as text for the others, also where it failed: they must not wait for it."""
        try:
            return json.dumps(work())
        except BaseException as error:
            self._error = error
            return json.dumps({"error": f"{type(error).__name__}: {error}"})

    def _agree(self, outcome: str) -> list[dict[str, Any]]:
        """Every rank's outcome. Raises this rank's own error, else the first of another rank's."""
        texts = self._ranks.exchange(outcome)
        if self._error is not None:
            raise self._error
        results: list[dict[str, Any]] = [json.loads(text) for text in texts]
        for rank, result in enumerate(results):
            if "error" in result:
                raise CheckpointError(f"saving to {self._root} failed on rank {rank}: {result['error']}")
        return results


def _nothing() -> None:
    """Where a caller has nothing to do afterwards."""


class _WithExtra:
    """A source and, after its own runs, the tensors of user data."""

    def __init__(self, source: StateSource, tensors: Mapping[str, Tensor]) -> None:
        self._source = source
        # Copies: the job may run while training goes on. They also make bytes of the flags that torch keeps for
        # conjugated and negated tensors.
        self._tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def items(self) -> list[Item]:
        own = [
            Item(
                name=name,
                kind=Kind.EXTRA,
                shape=tuple(t.shape),
                dtype=t.dtype,
                state_tensors=(StateTensor(WEIGHTS, t.dtype),),
            )
            for name, t in self._tensors.items()
        ]
        return [*self._source.items(), *own]

    def runs(self) -> list[Run]:
        own = [Run(name, WEIGHTS, 0, tensor.numel()) for name, tensor in self._tensors.items() if tensor.numel()]
        return [*self._source.runs(), *own]

    def values(self) -> Iterator[Tensor]:
        yield from self._source.values()
        yield from (tensor.reshape(-1) for tensor in self._tensors.values() if tensor.numel())
