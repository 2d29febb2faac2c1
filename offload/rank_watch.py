"""Who of the ranks is there, who has failed, and who has not come.

Owns: the session's part of the store that all ranks share: who they are (node, pid), the first failure, who waits at
which call, who has left.
Does not: move values between ranks (rank_groups.py) or decide what is called (collectives.py).
Threads: every method may be called from any thread. Nothing here waits for other ranks but `meet`.

Note [First failure]: a rank that dies closes its connections, its neighbours fail and close theirs, and so on: most
ranks see the end of a chain. So the first one that knows a cause writes it under one key, which nobody overwrites, and
everybody else's error repeats it.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from offload.errors import RankFailedError, WaitTimeoutError

LOOK_EVERY_S: Final = 1.0
"""How often a rank that waits looks whether another one has failed."""

CAUSE_WAIT_S: Final = 3.0
"""How long a cause is looked for after a connection broke: the kernel closes a killed rank's sockets before its pid."""

REMEDY: Final = "Restart all ranks from the last checkpoint."


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one rank's operating system process from all others."""

    node: str
    """Boot id and host name: ranks with the same one share memory and disks."""
    pid: int
    start: str
    """Clock ticks after boot; a pid that is used again has another one."""
    pid_view: str
    """The namespace in which the pid counts: containers of one node do not see each other's."""

    @classmethod
    def own(cls) -> "Identity":
        """Of this rank."""
        node = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {socket.gethostname()}"
        return cls(node, os.getpid(), _state_and_start(os.getpid())[1], str(Path("/proc/self/ns/pid").readlink()))

    def is_gone(self, seen_from: "Identity") -> bool:
        """Whether it has ended, as far as `seen_from` can tell."""
        if (self.node, self.pid_view) != (seen_from.node, seen_from.pid_view):
            return False
        state, start = _state_and_start(self.pid)
        return state in {"", "Z", "X"} or start != self.start


def _state_and_start(pid: int) -> tuple[str, str]:
    """State letter and start time; both empty where there is none of that pid."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "", ""
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks and brackets
    return fields[0], fields[19]


class RankWatch:
    """Knows every rank of one session through the store. `close` says that this one leaves in good order."""

    def __init__(self, store: Any, rank: int, world_size: int, wait_timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.wait_timeout_s = wait_timeout_s
        self._store = store
        self._identities: Sequence[Identity] = ()

    def meet(self) -> None:
        """Wait until every rank has come, and learn who they are. WaitTimeoutError names those that have not."""
        self._store.set(f"here/{self.rank}", json.dumps(asdict(Identity.own())))
        deadline = time.monotonic() + self.wait_timeout_s
        keys = [f"here/{rank}" for rank in range(self.world_size)]
        # Without this wait a group would be made with ranks that never come: hours later, in torch's words.
        while missing := self._missing_of(keys):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeoutError(
                    f"{name_ranks(missing)} did not come to offload.enable within {self.wait_timeout_s:g} s, and rank "
                    f"{self.rank} waits there; every rank of process_group has to call it, the same number of times. "
                    "Look at the output of the ranks that are missing."
                )
            self.raise_if_failed("meeting the other ranks")
            try:
                self._store.wait(keys, timedelta(seconds=min(LOOK_EVERY_S, left_s)))
            except RuntimeError:
                continue  # the slice of time is over
        self._identities = [Identity(**json.loads(self._store.get(key))) for key in keys]

    def _missing_of(self, keys: Sequence[str]) -> list[int]:
        return [rank for rank, key in enumerate(keys) if not self._store.check([key])]

    @property
    def local_ranks(self) -> list[int]:
        """The ranks of this node, in order."""
        own = self._identities[self.rank]
        return [rank for rank, each in enumerate(self._identities) if each.node == own.node]

    # ------------------------------------------------------------------------------------------------ failures

    def note_failure(self, rank: int, text: str) -> None:
        """Tell all ranks why `rank` cannot go on. Only the first note of a session stands."""
        try:
            self._store.compare_set("failed", "", json.dumps([rank, text]))
        except RuntimeError:
            return  # the store is gone with the rank that held it: the others see their connections break

    def failed(self) -> tuple[int, str] | None:
        """The rank that failed first and why, where anyone knows. Does not wait."""
        noted = self._read("failed")
        if noted is not None:
            rank, text = json.loads(noted)
            return int(rank), str(text)
        if not self._identities:
            return None
        own = self._identities[self.rank]
        for rank, identity in enumerate(self._identities):
            if self._read(f"left/{rank}") is None and identity.is_gone(own):
                self.note_failure(rank, f"its process {identity.pid} has ended without leaving the session")
                return self.failed() or (rank, f"its process {identity.pid} has ended")
        return None

    def raise_if_failed(self, what: str) -> None:
        """RankFailedError where a rank has failed; `what`: what this rank is about."""
        found = self.failed()
        if found is not None and found[0] != self.rank:
            raise RankFailedError(f"rank {found[0]} failed, and rank {self.rank} was at {what}: {found[1]}. {REMEDY}")

    def broken(self, what: str, error: BaseException) -> RankFailedError:
        """The error for a connection that broke in `what`, naming the rank that is the cause where it can be found."""
        deadline = time.monotonic() + CAUSE_WAIT_S
        never = threading.Event()
        while True:
            try:
                self.raise_if_failed(what)
            except RankFailedError as found:
                return found
            gone = [r for r in range(self.world_size) if r != self.rank and self._read(f"left/{r}") is not None]
            if gone:
                text = f"{name_ranks(gone)} left the session while rank {self.rank} was at {what}"
                return RankFailedError(f"{text}; every rank has to make the same calls. ({error})")
            if time.monotonic() > deadline:
                text = f"A rank that cannot be named failed, and rank {self.rank} was at {what}: {error}."
                return RankFailedError(f"{text} Look at the output of all ranks. {REMEDY}")
            never.wait(0.05)  # see CAUSE_WAIT_S: without it a killed rank could not be named

    # -------------------------------------------------------------------------------------------- who waits where

    def note_waiting(self, group: str, number: int) -> None:
        """Tell that this rank waits in the group's call of that number."""
        try:
            self._store.set(f"at/{group}/{self.rank}", str(number))
        except RuntimeError:
            return

    def absent(self, group: str, number: int) -> list[int]:
        """The ranks that are not known to have come to that call."""
        return [r for r in range(self.world_size) if int(self._read(f"at/{group}/{r}") or -1) < number]

    def close(self) -> None:
        """Say that this rank leaves in good order."""
        try:
            self._store.set(f"left/{self.rank}", "")
        except RuntimeError:
            return

    def _read(self, key: str) -> bytes | None:
        """What is under the key, None where nothing is or the store is gone."""
        try:
            return bytes(self._store.get(key)) if self._store.check([key]) else None
        except RuntimeError:
            return None


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 2` or `ranks 0, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def store_of_session(process_group: Any, rank: int) -> Any:
    """The part of the group's store that belongs to the session that this rank is about to join.

    Sessions are counted by each rank, in the store itself. (Not by dist.new_group: with local synchronisation its
    names depend on how many groups a process is in, which differs between ranks, and come again after a group was
    destroyed, so that ranks would read addresses of closed sockets.)
    """
    store = dist.distributed_c10d._get_process_group_store(process_group)
    # A connection of our own: the user's, or torch's own threads', long waits in the store would hold up ours.
    store = store.clone() if hasattr(store, "clone") else store
    number = store.add(f"offload/joined/{rank}", 1)
    return dist.PrefixStore(f"offload/{number}", store)
