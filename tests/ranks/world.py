"""Real ranks: functions of tests run in several operating system processes that torch.distributed connects.

Owns: a nursery that has torch and the library loaded and forks ranks in milliseconds; deadlines; what ranks return,
raise and print; no rank outlives its run, no run its test session.
Does not: know what is tested. `python -m tests.ranks.world FD` is the nursery; tests use the fixture `world`.

A function is named by module and name, gets its `Place` first, and finds the default group of torch.distributed made.
What it returns is pickled. Every run has new processes: nothing of one test is left in the next.
"""

import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch._dynamo  # seconds of every rank that makes an optimizer, which imports it
import torch.distributed as dist

import offload  # loaded once, before ranks are forked

ROOT = Path(offload.__file__).parents[1]
START_S = 60.0
STACKS_S = 0.5
POLL_S = 0.003
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Place:
    """Where a function runs."""

    rank: int
    world_size: int
    folder: Path
    """Of this run, shared by its ranks."""


@dataclass(frozen=True)
class Outcome:
    """How one rank ended."""

    rank: int
    status: int
    """Exit status; -9 for SIGKILL."""
    value: Any
    error: BaseException | None
    output: str
    """What it printed, with the traceback of its error."""


@dataclass(frozen=True)
class Job:
    """One run, as the nursery gets it."""

    module: str
    function: str
    arguments: Sequence[Any]
    world_size: int
    folder: Path
    timeout_s: float
    store: str
    """`file`, `tcp`, or `none`: torch.distributed is not initialised."""
    environment: dict[str, str] = field(default_factory=dict)


class World:
    """Starts ranks through one nursery. Used by one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_runs = 0
        ours, theirs = socket.socketpair()
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.ranks.world", str(theirs.fileno())],
            cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._connection = Connection(ours.detach())

    def run(self, function: Callable[..., Any], world_size: int, *arguments: Any, **options: Any) -> list[Any]:
        """What the function returned, by rank. Fails with the output of all ranks where one did not return."""
        ended = self.outcomes(function, world_size, *arguments, **options)
        failed = [each for each in ended if each.status != 0]
        if failed:
            texts = [f"--- rank {each.rank}, exit status {each.status}\n{each.output}" for each in ended]
            raise AssertionError("\n".join([f"{function.__name__}: {len(failed)} ranks failed", *texts]))
        return [each.value for each in ended]

    def outcomes(
        self, function: Callable[..., Any], world_size: int, *arguments: Any,
        timeout_s: float = 60.0, store: str = "file", **environment: str,
    ) -> list[Outcome]:  # fmt: skip
        """How each rank ended. After `timeout_s` those that are left print their stacks and are killed."""
        self._num_runs += 1
        folder = self.folder_of_last_run
        folder.mkdir()
        job = Job(
            function.__module__, function.__qualname__, arguments, world_size, folder, timeout_s, store, environment
        )
        self._connection.send(job)
        if not self._connection.poll(START_S + timeout_s + STACKS_S):
            raise AssertionError(f"the nursery of ranks does not answer about {job.function}")
        statuses = self._connection.recv()
        return [_outcome(folder, rank, status) for rank, status in enumerate(statuses)]

    @property
    def folder_of_last_run(self) -> Path:
        """What its ranks knew as `Place.folder`."""
        return self._folder / f"run{self._num_runs - 1}"

    def close(self) -> None:
        """End the nursery; its ranks end with their runs."""
        self._connection.close()
        try:
            self._nursery.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()


def _outcome(folder: Path, rank: int, status: int) -> Outcome:
    result = folder / f"rank{rank}.result"
    value, error = pickle.loads(result.read_bytes()) if result.exists() else (None, None)
    return Outcome(rank, status, value, error, (folder / f"rank{rank}.output").read_text(errors="replace"))


# ---------------------------------------------------------------------------------------------------------- the nursery


def _die_with(parent: int) -> None:
    """Be killed when the parent ends, however it does."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _load() -> None:
    """What every rank would load for itself: kernels, and what is imported when a session begins."""
    for precision in ("fp32", "bf16"):
        model = torch.nn.Linear(8, 8)
        optimizer = torch.optim.AdamW(model.parameters())
        with offload.enable(model, optimizer, device="cpu", device_memory="8MiB", precision=precision):
            pass
    gc.collect()
    gc.freeze()  # a session ends with a collection, which would walk all of torch in every rank


def _serve(connection: Connection) -> NoReturn:
    while True:
        try:
            job = connection.recv()
        except EOFError:
            os._exit(0)  # nothing to clean up, and unloading torch takes seconds
        importlib.import_module(job.module)  # once for all runs
        connection.send(_run(job))


def _run(job: Job) -> list[int]:
    """Fork the ranks and wait for them: their exit statuses."""
    nursery = os.getpid()
    rank_of = {}
    for rank in range(job.world_size):
        pid = os.fork()
        if pid == 0:
            _die_with(nursery)
            _be_rank(job, rank)
        rank_of[pid] = rank
    statuses: dict[int, int] = {}
    for seconds, at_end in ((job.timeout_s, signal.SIGUSR1), (STACKS_S, signal.SIGKILL), (START_S, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        while len(statuses) < job.world_size and time.monotonic() < deadline:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                statuses[rank_of[pid]] = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(POLL_S)
        for pid, rank in rank_of.items():
            if rank not in statuses:
                os.kill(pid, at_end)
    return [statuses[rank] for rank in range(job.world_size)]


def _be_rank(job: Job, rank: int) -> NoReturn:
    """The whole life of one rank. Ends without Python's clean-up, which could wait for other ranks."""
    output = os.open(job.folder / f"rank{rank}.output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - until the process ends
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    os.environ.update(job.environment)
    status, value, error = 0, None, None
    try:
        _connect(job, rank)
        value = _resolve(job)(Place(rank, job.world_size, job.folder), *job.arguments)
    except BaseException as raised:
        traceback.print_exc()
        status, error = 1, raised
    _write(job.folder / f"rank{rank}.result", value, error)
    os._exit(status)


def _resolve(job: Job) -> Callable[..., Any]:
    found: Any = importlib.import_module(job.module)
    for name in job.function.split("."):
        found = getattr(found, name)
    return found


def _connect(job: Job, rank: int) -> None:
    if job.store == "none":
        return
    if job.store == "file":
        store: dist.Store = dist.FileStore(str(job.folder / "store"), job.world_size)
    else:
        store = _tcp_store(job.folder / "port", rank, job.world_size)
    timeout = timedelta(seconds=job.timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=timeout)
    dist.barrier()  # a function that ends at once would take away the connections that others are still making


def _tcp_store(port: Path, rank: int, world_size: int) -> dist.Store:
    """Held by rank 0, on a port that the system chooses."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
        unfinished = port.with_suffix(".part")
        unfinished.write_text(str(store.port))
        unfinished.replace(port)
        return store
    while not port.exists():
        time.sleep(POLL_S)
    return dist.TCPStore("127.0.0.1", int(port.read_text()), world_size, is_master=False)


def _write(path: Path, value: Any, error: BaseException | None) -> None:
    try:
        result = pickle.dumps((value, error))
        pickle.loads(result)  # some exceptions can be written and not read
    except Exception as reason:
        result = pickle.dumps((None, RuntimeError(f"{error!r} or its value cannot be pickled: {reason!r}")))
    path.write_bytes(result)


if __name__ == "__main__":
    _die_with(os.getppid())
    torch.set_num_threads(1)
    _load()
    _serve(Connection(int(sys.argv[1])))
