"""What ranks do together: the door to torch.distributed for everything else.

Owns: which group serves which thread, joining and leaving a session's ranks.
Does not: speak to backends (groups.py), find out who failed (watch.py) or decide when a collective is made.
Threads: those that protocol.py names. There is one group for each of them, so that the order between threads is free.
"""

import logging
import os
import threading
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from offload.errors import ConfigError, WaitTimeoutError
from offload.ranks.groups import Group, change_bytes, check_backend, group_for
from offload.ranks.protocol import F64, U8, Ranks
from offload.ranks.single import SINGLE_RANK
from offload.ranks.watch import RankWatch, store_of_session

log = logging.getLogger("offload")

CLOSE_WAIT_S: Final = 3.0
"""How long closing waits for connections to end; those of a call that a failed rank left half made take longer."""


class GroupTexts:
    """Texts over a group of their own."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank = group.rank
        self.world_size = group.world_size

    def exchange(self, text: str) -> list[str]:
        """What every rank gave, by rank."""
        self._group.check_order("exchange")
        return self._group.texts(text)


class ProcessRanks:
    """Ranks that are operating system processes, over torch.distributed. Made by `join`."""

    is_sharded = True

    def __init__(self, process_group: Any, device: torch.device, wait_timeout_s: float) -> None:
        self.rank: int = dist.get_rank(process_group)
        self.world_size: int = dist.get_world_size(process_group)
        store = store_of_session(process_group, self.rank)
        self._watch = RankWatch(store, self.rank, self.world_size, wait_timeout_s)
        try:
            backend = backend_for(device, process_group)
            check_backend(device, backend)
            self._watch.meet()
            local = self._watch.local_ranks
            self.local_rank, self.num_local = local.index(self.rank), len(local)
            self._order, self._training, self._step, saving = (
                Group(name, store, self._watch) for name in ("order", "training", "step", "saving")
            )
            self._shards = group_for(device, backend, store, self._watch)
        except BaseException as error:
            if not isinstance(error, WaitTimeoutError):  # the others come to that by themselves, and say who is missing
                self._watch.note_failure(self.rank, f"{type(error).__name__} in offload.enable: {error}")
            self._watch.close()
            raise
        self.saving = GroupTexts(saving)
        self._groups = [self._shards, self._order, self._training, self._step, saving]

    @classmethod
    def join(cls, process_group: Any = None, *, device: torch.device, wait_timeout_s: float) -> Ranks:
        """The ranks of `process_group` (default: all). A single one where torch.distributed is not in use.

        Every rank of the group calls it, and comes back when all have. Training thread.
        """
        if not (dist.is_available() and dist.is_initialized()):
            check_environment(process_group)
            return SINGLE_RANK
        _check_group(process_group)
        if dist.get_rank(process_group) < 0:
            raise ConfigError(
                f"rank {dist.get_rank()} called offload.enable with a process_group that it is not in; give the group "
                "of this rank, or do not call it here."
            )
        if dist.get_world_size(process_group) == 1:
            return SINGLE_RANK
        return cls(dist.group.WORLD if process_group is None else process_group, device, wait_timeout_s)

    # --------------------------------------------------------------------------------------------- collective lane

    def ask(self, what: str) -> None:
        self._watch.program.ask(what)

    def check_order(self, what: str) -> None:
        self._order.check_order(what)

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        self._shards.all_gather(whole, shard)

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        self._shards.all_to_all(received, sent)

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> None:
        self._shards.reduce_scatter(shard, whole)

    # --------------------------------------------------------------------------------------------------- step lane

    def totals(self, values: F64) -> F64:
        self._step.check_order(f"totals of {values.shape}")
        own = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        totals: F64 = self._step.gather(own).numpy()
        return totals

    # --------------------------------------------------------------------------------------------- training thread

    def exchange(self, text: str) -> list[str]:
        self._check_training("exchange texts (enable, save, load, export, gathered)")
        return self._training.texts(text)

    def unite(self, bits: U8, what: str = "unite") -> U8:
        self._check_training(f"{what} {bits.shape}")
        united = np.array(bits, dtype=np.uint8, order="C")
        self._training.largest(torch.from_numpy(united))
        return united

    def broadcast(self, tensor: Tensor) -> None:
        self._check_training(f"take over the first rank's {tuple(tensor.shape)} {tensor.dtype}")
        change_bytes(tensor, self._training.broadcast)

    def fill_in(self, tensor: Tensor) -> None:
        shape = f"{tuple(tensor.shape)} {tensor.dtype}"
        self._check_training(f"read values {shape} of all ranks (state_dict, gathered, close)")
        change_bytes(tensor, self._training.add)

    def _check_training(self, what: str) -> None:
        self._watch.program.ask(what)
        self._training.check_order(what)

    # -------------------------------------------------------------------------------------------------- any thread

    def note_failure(self, text: str) -> None:
        self._watch.note_failure(self.rank, text)

    def failed(self) -> str | None:
        found = self._watch.failed()
        return found if found is None else f"rank {found[0]}: {found[1]}"

    def close(self) -> None:
        groups, self._groups = self._groups, []
        if not groups:
            return
        self._watch.close()

        def end() -> None:
            while groups:
                groups.pop().close()

        # gloo ends its threads when a backend is dropped, and they end with their calls: one that a dead or absent
        # rank left half made would hold up the training thread until the backend's own deadline.
        closing = threading.Thread(target=end, name="offload closes ranks", daemon=True)
        closing.start()
        closing.join(CLOSE_WAIT_S)
        if closing.is_alive():
            log.warning("connections to other ranks are still closing: a call is on its way that not all ranks made")


def _check_group(process_group: Any) -> None:
    if not (process_group in (None, dist.GroupMember.NON_GROUP_MEMBER) or isinstance(process_group, dist.ProcessGroup)):
        raise ConfigError(
            f"process_group={process_group!r} is no group of ranks; give what torch.distributed.new_group returns, or "
            "leave it out for all ranks."
        )


def check_environment(process_group: Any) -> None:
    """ConfigError where ranks were meant and torch.distributed is not in use."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if process_group is not None:
        raise ConfigError(
            f"process_group={process_group!r} was given and torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() before offload.enable."
        )
    if world_size.isdecimal() and int(world_size) > 1:
        raise ConfigError(
            f"the environment says WORLD_SIZE={world_size} (as torchrun sets it) and torch.distributed is not "
            "initialised: each rank would train a model of its own. Call torch.distributed.init_process_group() before "
            "offload.enable, or unset WORLD_SIZE to train with one."
        )


def backend_for(device: torch.device, process_group: Any) -> str:
    """What the user's group uses for tensors on the device; empty where it has nothing for them."""
    pairs = (pair.partition(":") for pair in dist.get_backend_config(process_group).split(","))
    return {kind: backend for kind, _, backend in pairs}.get(device.type, "")
