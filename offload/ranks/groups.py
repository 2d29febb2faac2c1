"""Connections between the ranks: one group for each thread that speaks to the other ranks.

Owns: torch's backends and the names of their calls, the wait for a call, bytes of tensors on any device.
Does not: find out who failed (watch.py) or say which thread uses which group (collectives.py).
Threads: one thread at a time for each group, the same one on every rank: calls meet in the order they are made in.

Backends are made directly over a store of the session, without a place in torch's table of groups: their calls never
meet those of the user, and `destroy_process_group` of the user does not take them away.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from hashlib import blake2b
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from offload.errors import ConfigError, WaitTimeoutError
from offload.ranks.watch import LOOK_EVERY_S, RankWatch, diverged, name_ranks
from offload.units import MIB

PART_BYTES: Final = 64 * MIB
"""Part of a tensor that is on its way at once, and staged in host memory where the tensor is not there."""

BACKEND_MARGIN_S: Final = 30.0
"""Our own deadline comes first: its error says who is missing."""

ORDER_BYTES: Final = 16
"""What ranks compare before a call: eight bytes of a hash of its name, eight of its number."""


class Group:
    """One gloo backend over all ranks of the session, for tensors in host memory."""

    def __init__(self, name: str, store: Any, watch: RankWatch) -> None:
        self.name = name
        self.rank = watch.rank
        self.world_size = watch.world_size
        self._watch = watch
        self._backend: Any = _gloo(dist.distributed_c10d.PrefixStore(name, store), watch)
        self._num_calls = 0
        self._what = ""
        self._own_order = torch.zeros(self.world_size, ORDER_BYTES, dtype=torch.uint8)
        self._orders = torch.zeros(self.world_size, ORDER_BYTES, dtype=torch.uint8)

    def close(self) -> None:
        """Drop the backend. May take until its deadline where a call is on its way that not all ranks made."""
        self._backend = None

    # ------------------------------------------------------------------------------------------------- same order

    def check_order(self, what: str) -> None:
        """RanksDivergedError where not all ranks are about to do `what`."""
        self._what = what
        digest = blake2b(what.encode(), digest_size=8).digest() + self._num_calls.to_bytes(8, "little")
        self._own_order[:] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        # All to all, not all-gather: it is the fastest of gloo's calls for a few bytes.
        self._run(lambda: self._backend.alltoall_base(self._orders.view(-1), self._own_order.view(-1), [], []))
        if bool((self._orders == self._own_order).all()):
            return
        raise diverged(dict(enumerate(self.texts(what))))

    # ----------------------------------------------------------------------------------------------------- values

    def texts(self, text: str) -> list[str]:
        """Every rank's text, by rank."""
        raw = text.encode()
        lengths = self.gather(torch.tensor([len(raw)], dtype=torch.int64)).flatten().tolist()
        padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
        padded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else padded[:0]
        rows = self.gather(padded).numpy()
        return [rows[rank, :length].tobytes().decode() for rank, length in enumerate(lengths)]

    def gather(self, row: Tensor) -> Tensor:
        """(W, n): every rank's row of n elements."""
        rows = torch.empty((self.world_size, row.numel()), dtype=row.dtype)
        self._run(lambda: self._backend._allgather_base(as_bytes(rows), as_bytes(row)))
        return rows

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        """whole = the shards in rank order; the shard may be its place in `whole`."""
        self._what = f"the all-gather of {whole.nbytes} bytes"
        self._run(lambda: self._backend._allgather_base(whole, shard))

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        """Part i of `sent` goes to rank i; part i of `received` comes from it."""
        self._what = f"the all-to-all of {sent.nbytes} bytes"
        self._run(lambda: self._backend.alltoall_base(received, sent, [], []))

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> None:
        """shard = the sum over ranks of its place in `whole`."""
        self._what = f"the reduce-scatter of {whole.nbytes} bytes"
        self._run(lambda: self._backend._reduce_scatter_base(shard, whole))

    def broadcast(self, raw: Tensor) -> None:
        """Bytes of rank 0, in place."""
        self._run(lambda: self._backend.broadcast([raw], _from_rank_0()))

    def add(self, raw: Tensor) -> None:
        """The sum over ranks, in place."""
        self._run(lambda: self._backend.allreduce([raw], _reduced_by(dist.ReduceOp.SUM)))

    def largest(self, raw: Tensor) -> None:
        """The element-wise maximum over ranks, in place."""
        self._run(lambda: self._backend.allreduce([raw], _reduced_by(dist.ReduceOp.MAX)))

    # --------------------------------------------------------------------------------------------------- the wait

    def _run(self, issue: Callable[[], Any]) -> None:
        """Make one call and wait until it is over; RankFailedError or WaitTimeoutError where that cannot be."""
        number, self._num_calls = self._num_calls, self._num_calls + 1
        try:
            work = issue()
        except RuntimeError as error:
            raise self._watch.broken(self._what, error) from error
        if _is_over(work, LOOK_EVERY_S):
            return self._finish(work)
        self._watch.note_waiting(self.name, number)
        deadline = time.monotonic() + self._watch.wait_timeout_s
        num_looks = 0
        # Values are read, and buffers used again, when this returns: without the wait they would be half old.
        while not _is_over(work, LOOK_EVERY_S):
            self._watch.raise_if_failed(self._what)
            num_looks += 1
            if num_looks.bit_count() == 1:  # less and less often: all ranks read what all have told
                self._watch.raise_if_diverged()
            if time.monotonic() > deadline:
                absent = self._watch.absent(self.name, number)
                who = name_ranks(absent) if absent else "no rank"
                raise WaitTimeoutError(
                    f"rank {self.rank} waited {self._watch.wait_timeout_s:g} s for the other ranks in {self._what} "
                    f"({self.name}, call {number}), where {who} did not arrive. Look at where those ranks are "
                    "(py-spy dump); raise wait_timeout_s if they may take that long."
                )
        return self._finish(work)

    def _finish(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._watch.broken(self._what, error) from error


def _is_over(work: Any, seconds: float) -> bool:
    """Whether the call ends, well or not, within `seconds`."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        return bool(work.is_completed())
    return True


def _gloo(store: Any, watch: RankWatch) -> Any:
    made: Future[Any] = Future()

    def make() -> None:
        try:
            made.set_result(dist.ProcessGroupGloo(store, watch.rank, watch.world_size, _backend_timeout(watch)))
        except BaseException as error:
            made.set_exception(error)

    # In a thread of its own: gloo waits for the addresses of all ranks, and cannot be told that one has failed.
    threading.Thread(target=make, name="offload connects ranks", daemon=True).start()
    while True:
        try:
            return made.result(LOOK_EVERY_S)
        except TimeoutError:
            watch.raise_if_failed("connecting to the other ranks")
        except RuntimeError as error:
            raise watch.broken("connecting to the other ranks", error) from error


def _backend_timeout(watch: RankWatch) -> timedelta:
    return timedelta(seconds=watch.wait_timeout_s + BACKEND_MARGIN_S)


def _from_rank_0() -> Any:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


def _reduced_by(operation: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    return options


# ------------------------------------------------------------------------------------------------------- accelerators


class DeviceGroup:
    """An NCCL backend for tensors on the device: calls are issued on the current stream, no thread waits.

    A call that a failed rank keeps from ending is found by whoever waits for the stream.
    """

    def __init__(self, name: str, store: Any, watch: RankWatch) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _backend_timeout(watch)
        self._watch = watch
        self._backend: Any = dist.ProcessGroupNCCL(
            dist.distributed_c10d.PrefixStore(name, store), watch.rank, watch.world_size, options
        )

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        """As Group's."""
        self._issue("all_gather", lambda: self._backend._allgather_base(whole, shard))

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        """As Group's."""
        self._issue("all_to_all", lambda: self._backend.alltoall_base(received, sent, [], []))

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> None:
        """As Group's."""
        self._issue("reduce_scatter", lambda: self._backend._reduce_scatter_base(shard, whole))

    def _issue(self, what: str, issue: Callable[[], Any]) -> None:
        try:
            # The current stream waits, not the thread: without it the next kernel would read what has not arrived.
            issue().wait()
        except RuntimeError as error:
            raise self._watch.broken(what, error) from error

    def close(self) -> None:
        """End the connections; with calls of a failed rank still on their way, without waiting for them."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.abort() if self._watch.failed() else backend.shutdown()


class StagedGroup:
    """For tensors on a device that the user's group has gloo for: through host memory, and the thread waits."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def all_gather(self, whole: Tensor, shard: Tensor) -> None:
        """As Group's."""
        staged = torch.empty(whole.shape, dtype=whole.dtype)
        self._group.all_gather(staged, shard.cpu())
        whole.copy_(staged)

    def all_to_all(self, received: Tensor, sent: Tensor) -> None:
        """As Group's."""
        staged = torch.empty(received.shape, dtype=received.dtype)
        self._group.all_to_all(staged, sent.cpu())
        received.copy_(staged)

    def reduce_scatter(self, shard: Tensor, whole: Tensor) -> None:
        """As Group's."""
        staged = torch.empty(shard.shape, dtype=shard.dtype)
        self._group.reduce_scatter(staged, whole.cpu())
        shard.copy_(staged)

    def close(self) -> None:
        """As Group's."""
        self._group.close()


def check_backend(device: torch.device, backend: str) -> None:
    """ConfigError where ranks cannot exchange tensors of `device`; `backend`: what the user's group has for them."""
    if not dist.is_gloo_available():
        raise ConfigError("this build of torch has no gloo, by which ranks agree; install one that has it.")
    if device.type != "cpu" and backend not in {"nccl", "gloo"}:
        raise ConfigError(
            f"process_group has {backend or 'no backend'} for device {device}, where ranks exchange tensors by nccl or "
            f"gloo: call torch.distributed.init_process_group('cpu:gloo,{device.type}:nccl')."
        )


def group_for(device: torch.device, backend: str, store: Any, watch: RankWatch) -> "Group | DeviceGroup | StagedGroup":
    """For tensors on `device`, where the user's group uses `backend` for them."""
    if device.type == "cpu":
        return Group("shards", store, watch)
    return DeviceGroup("shards", store, watch) if backend == "nccl" else StagedGroup(Group("shards", store, watch))


# -------------------------------------------------------------------------------------------------------------- bytes


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, (n,), the same memory."""
    return tensor.reshape(-1).view(torch.uint8)


def change_bytes(tensor: Tensor, change: Callable[[Tensor], None]) -> None:
    """Let `change` work in place on parts of the tensor's bytes in host memory, on any device, of any strides."""
    with torch.no_grad():
        values = tensor.detach()
        whole = values.contiguous()
        raw = as_bytes(whole)
        for start in range(0, raw.numel(), PART_BYTES):
            part = raw[start : start + PART_BYTES]
            host = part.cpu()  # itself where it is in host memory
            change(host)
            if part.device != host.device:
                part.copy_(host)
        if not values.is_contiguous():
            values.copy_(whole)
