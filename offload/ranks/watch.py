"""Who of the ranks is there, who has failed, and who has not come.

Owns: the session's part of the store that all ranks share: who they are (node, pid), the first failure, who waits at
which call, what each has asked for, who has left.
Does not: move values between ranks (groups.py) or decide what is called (collectives.py).
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch.distributed as dist

from offload.errors import RankFailedError, RanksDivergedError, WaitTimeoutError
from offload.ranks.program import Program, parting

LOOK_EVERY_S: Final = 1.0
"""How often a rank that waits looks whether another one has failed."""

FIRST_LOOK_S: Final = 0.002
"""A rank that waits for others to come looks after this time, then after twice as long each time, to LOOK_EVERY_S."""

CAUSE_WAIT_S: Final = 3.0
"""How long a cause is looked for after a connection broke: the kernel closes a killed rank's sockets before its pid."""

SHOWN: Final = 160
"""Characters of what a rank is about to do that an error shows."""

UNNAMED: Final = -1
"""Stands for a rank that failed where nobody knows which one it was."""

T = TypeVar("T")


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
        self.program = Program()
        self._store = store
        self._identities: Sequence[Identity] = ()
        self._first_failure: tuple[int, str] | None = None
        """Remembered: the store may go with the rank that holds it."""

    def meet(self) -> None:
        """Wait until every rank has come, and learn who they are. WaitTimeoutError names those that have not."""
        self._ask(lambda store: store.set(f"here/{self.rank}", json.dumps(asdict(Identity.own()))))
        deadline = time.monotonic() + self.wait_timeout_s
        keys = [f"here/{rank}" for rank in range(self.world_size)]
        never, pause_s = threading.Event(), FIRST_LOOK_S
        # Without this wait a group would be made with ranks that never come: an error in torch's words, and late.
        while missing := [rank for rank, key in enumerate(keys) if self._read(key) is None]:
            if self._store is None:
                raise RankFailedError(
                    f"rank {self.rank} lost the store by which ranks find each other; rank 0, or torchrun, holds it. "
                    "Look at its output."
                )
            self.raise_if_failed("offload.enable")
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WaitTimeoutError(
                    f"{name_ranks(missing)} did not come to offload.enable within {self.wait_timeout_s:g} s, and rank "
                    f"{self.rank} waits there; every rank of process_group has to call it, the same number of times. "
                    "Look at the output of the ranks that are missing."
                )
            # Not the store's own wait: at the end of each slice of time torch prints two lines about it.
            never.wait(min(pause_s, left_s))
            pause_s = min(2 * pause_s, LOOK_EVERY_S)
        if gone := self._left():
            raise self._error(gone[0], "offload.enable", "it came there and left before all had come")
        self._identities = [Identity(**json.loads(self._read(key) or b"")) for key in keys]

    @property
    def local_ranks(self) -> list[int]:
        """The ranks of this node, in order."""
        own = self._identities[self.rank]
        return [rank for rank, each in enumerate(self._identities) if each.node == own.node]

    # ------------------------------------------------------------------------------------------------ failures

    def note_failure(self, rank: int, text: str) -> None:
        """Tell all ranks why `rank` cannot go on. Only the first note of a session stands."""
        self._ask(lambda store: store.compare_set("failed", "", json.dumps([rank, text])))

    def failed(self) -> tuple[int, str] | None:
        """The rank that failed first and why, where anyone knows. Does not wait."""
        noted = self._noted()
        if noted is not None or not self._identities:
            return noted
        own = self._identities[self.rank]
        for rank, identity in enumerate(self._identities):
            if identity.is_gone(own) and self._read(f"left/{rank}") is None:
                text = f"its process {identity.pid} has ended without leaving the session"
                self.note_failure(rank, text)
                return self._noted() or (rank, text)
        return None

    def _noted(self) -> tuple[int, str] | None:
        noted = self._read("failed") if self._first_failure is None else None
        if noted is not None:
            rank, text = json.loads(noted)
            self._first_failure = int(rank), str(text)
        return self._first_failure

    def raise_if_failed(self, what: str) -> None:
        """RankFailedError where a rank has failed; `what`: what this rank is about."""
        found = self.failed()
        if found is not None:  # also this rank itself: its other threads are not to wait for ranks that may never come
            raise self._error(found[0], what, found[1])

    def broken(self, what: str, error: BaseException) -> RankFailedError:
        """The error for a connection that broke in `what`, naming the rank that is the cause where it can be found."""
        deadline = time.monotonic() + CAUSE_WAIT_S
        never = threading.Event()
        while time.monotonic() < deadline:
            found = self.failed()
            if found is not None and found[0] != self.rank:
                return self._error(found[0], what, found[1])
            if gone := self._left():
                self.note_failure(gone[0], "it left the session, and every rank has to make the same calls")
            never.wait(0.05)  # see CAUSE_WAIT_S: without it a killed rank could not be named
        self.note_failure(UNNAMED, f"rank {self.rank} lost a connection: {error}")
        rank, text = self._noted() or (UNNAMED, str(error))
        return self._error(rank, what, text)

    def _left(self) -> list[int]:
        """The other ranks that have left."""
        return [r for r in range(self.world_size) if r != self.rank and self._read(f"left/{r}") is not None]

    def _error(self, rank: int, what: str, text: str) -> RankFailedError:
        who = f"rank {rank}" if rank != UNNAMED else "a rank that cannot be named"
        where = f"rank {self.rank} was" if rank != self.rank else "was itself"
        return RankFailedError(
            f"{who} failed, and {where} at {_part_of(what)}: {text}. Look at the output of that rank, and restart all "
            "ranks from the last checkpoint."
        )

    # -------------------------------------------------------------------------------------------- who waits where

    def note_waiting(self, group: str, number: int) -> None:
        """Tell that this rank waits in the group's call of that number."""
        self._ask(lambda store: store.set(f"at/{group}/{self.rank}", str(number)))

    def raise_if_diverged(self) -> None:
        """Tell what this rank has asked for. RanksDivergedError where another one that waits long asked otherwise.

        See Note [Same program].
        """
        own = self.program.told()
        self._ask(lambda store: store.set(f"asked/{self.rank}", own))
        for rank in range(self.world_size):
            told = self._read(f"asked/{rank}") if rank != self.rank else None
            if told is not None and (differing := parting(own, told.decode())) is not None:
                error = diverged({self.rank: differing[0], rank: differing[1]})
                self.note_failure(self.rank, str(error))
                raise error

    def absent(self, group: str, number: int) -> list[int]:
        """The ranks that are not known to have come to that call."""
        return [r for r in range(self.world_size) if int(self._read(f"at/{group}/{r}") or -1) < number]

    def close(self) -> None:
        """Say that this rank leaves in good order."""
        self._ask(lambda store: store.set(f"left/{self.rank}", ""))
        self._store = None

    def _read(self, key: str) -> bytes | None:
        """What is under the key, None where nothing is or the store is gone."""
        return self._ask(lambda store: bytes(store.get(key)) if store.check([key]) else None)

    def _ask(self, question: Callable[[Any], T]) -> T | None:
        """The store's answer; None for good once it is gone with the rank, or the agent, that held it."""
        store = self._store
        if store is None:
            return None
        try:
            return question(store)
        except RuntimeError:
            self._store = None  # each further question would fail as well, and torch prints a page about it
            return None


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 2` or `ranks 0, 2`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def diverged(by_rank: Mapping[int, str]) -> RanksDivergedError:
    """The error for ranks that are about to do different things, with what each is about to do."""
    columns = enumerate(zip(*by_rank.values(), strict=False))
    shared = next((at for at, letters in columns if len(set(letters)) > 1), 0)
    lines = [f"rank {rank}: {_part_of(text, shared - SHOWN // 2)}" for rank, text in sorted(by_rank.items())]
    return RanksDivergedError(
        f"the ranks are about to do different things: {'; '.join(lines)}. All ranks have to run the same modules, and "
        "call the session, in the same order and with the same options: look for what depends on the rank or on its "
        "own batch (a branch of the model, a skipped batch, an early end of the loader, something for the first rank "
        "alone)."
    )


def _part_of(text: str, first: int = 0) -> str:
    """What an error shows of a long text, from about its character `first` on."""
    first = max(0, min(first, len(text) - SHOWN))
    part = text[first : first + SHOWN]
    return f"{'…' * (first > 0)}{part}{'…' * (first + len(part) < len(text))}"


def of_this_attempt(store: Any) -> Any:
    """The part of torchrun's store that belongs to this start of the ranks.

    The store outlives ranks that torchrun starts again, and with it what the killed ones wrote: addresses where nobody
    listens, and counts that differ between ranks. (torch does not keep them apart since 2.6.) With several nodes each
    counts restarts for itself, so there it takes TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: a store of each attempt.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return dist.distributed_c10d.PrefixStore(f"attempt {attempt}", store) if is_alone else store


def store_of_session(process_group: Any, rank: int) -> Any:
    """The part of the group's store that belongs to the session that this rank is about to join.

    Sessions are counted by each rank, in the store itself. (Not by dist.new_group: with local synchronisation its
    names depend on how many groups a process is in, which differs between ranks, and come again after a group was
    destroyed, so that ranks would read addresses of closed sockets.)
    """
    store = dist.distributed_c10d._get_process_group_store(process_group)
    # A connection of our own: the user's, or torch's own threads', long waits in the store would hold up ours.
    store = store.clone() if hasattr(store, "clone") else store
    store = of_this_attempt(store)
    number = store.add(f"offload/joined/{rank}", 1)
    return dist.distributed_c10d.PrefixStore(f"offload/{number}", store)
