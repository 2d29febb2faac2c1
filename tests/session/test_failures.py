"""Failures in flight: they surface with their cause, nothing hangs, nothing is left behind."""

import contextlib
import errno
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from offload.concurrency.futures import Future
from offload.concurrency.lanes import Lanes, current_lane
from offload.concurrency.timeline import Timeline
from offload.config import make_config
from offload.disk.io_queue import IoQueue
from offload.disk.transfer import OsFunctions
from offload.enable import start
from offload.errors import SessionClosedError, SessionFailedError, TransferError, WaitTimeoutError
from offload.kernels.workers import Workers
from offload.session import Session
from tests.training.models import mlp
from tests.training.oracle import PLENTY, adamw, assert_same_bits, smallest, weights_of

SOON_S: Final = 5.0
"""Within this a failure must have surfaced, on a machine that is busy."""

LANES: Final = ("fetch", "fetch read", "h2d", "d2h issue", "d2h", "gradient store", "step read", "step")
"""All that a session on the CPU has; the disk's threads are no lane."""

Loop = Callable[[nn.Module, torch.optim.Optimizer], None]


class InjectedError(RuntimeError):
    """What the tests break with."""


class FragileLanes(Lanes):
    """Real lanes, of which one can be made to fail."""

    def __init__(self, wait_timeout_s: float = 60.0) -> None:
        super().__init__(Timeline(), wait_timeout_s=wait_timeout_s)
        self._broken = ""
        self._num_good = 0

    def break_lane(self, name: str, *, after: int) -> None:
        """Let `after` more units of this lane run; the next one fails."""
        self._broken, self._num_good = name, after

    def run_unit(self, work: Callable[[], Any], future: "Future[Any]") -> None:
        if current_lane() == self._broken:
            self._num_good -= 1
            work = _fail if self._num_good == -1 else work
        super().run_unit(work, future)


class FragileDisk:
    """Real system calls, until one of them fails or stalls."""

    def __init__(self) -> None:
        self.broken: Callable[[], Any] | None = None
        """Called instead of a transfer; also decides when it goes on."""
        self.direction = "read"

    def functions(self) -> OsFunctions:
        """For a queue."""
        return OsFunctions(
            preadv=partial(self._call, "read", os.preadv), pwritev=partial(self._call, "write", os.pwritev)
        )

    def _call(self, direction: str, call: Any, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if self.broken is not None and direction == self.direction:
            self.broken()
        return int(call(descriptor, views, offset))


def _fail() -> None:
    raise InjectedError("injected")


def make(
    folder: Path, *, lanes: Lanes | None = None, disk: FragileDisk | None = None
) -> tuple[nn.Module, torch.optim.Optimizer, Session]:
    """A session with all of its model on disk."""
    model = mlp()
    optimizer = adamw(model)
    options: dict[str, Any] = {"precision": "fp32", "disk": folder, "device": "cpu"}
    device_bytes = smallest("device_memory", model, optimizer, host_memory=PLENTY, **options)
    host_bytes = smallest("host_memory", model, optimizer, device_memory=device_bytes, **options)
    config = make_config(
        device_memory=device_bytes, host_memory=host_bytes, disk=folder, disk_space=None, precision="fp32",
        max_grad_norm=None, accumulate=None, wait_timeout_s=60.0,
    )  # fmt: skip
    queue_of = partial(IoQueue, os_functions=disk.functions()) if disk is not None else IoQueue
    return model, optimizer, start(model, optimizer, config, "cpu", lanes=lanes, queue_of=queue_of)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def nothing_stays(folder: Path) -> Iterator[Callable[[Session], None]]:
    """Afterwards: no file, thread or descriptor more than before. It closes the sessions it is told of."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    sessions: list[weakref.ref[Session]] = []
    try:
        yield lambda session: sessions.append(weakref.ref(session))
    except BaseException:  # a test that fails must not spoil those after it
        for session in [ref() for ref in sessions]:
            if session is not None:
                session.close(give_back=False)
        raise
    gc.collect()
    assert list(folder.iterdir()) == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("offload")] == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def causes(error: BaseException | None) -> list[type[BaseException]]:
    """The error's type and those of its causes."""
    found = []
    while error is not None:
        found.append(type(error))
        error = error.__cause__
    return found


def failure_of(call: Callable[[], Any]) -> tuple[list[type[BaseException]], str]:
    """Types and message of the error that `call` soon ends with; nothing else of it is kept."""
    start_s = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - what it is comes back
        call()
    assert time.monotonic() - start_s < SOON_S
    return causes(caught.value), str(caught.value)


def assert_session_says_it_failed(session: Session, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Whatever is asked of it, and it presents no weights as trained; afterwards it is closed."""
    calls: list[Callable[[], Any]] = [
        optimizer.step,
        session.step,
        model.state_dict,
        session.weights_sha256,
        lambda: session.gathered().__enter__(),
    ]
    for call in calls:
        types, message = failure_of(call)
        assert types[0] is SessionFailedError
        assert "failed on lane" in message
    session.close()
    session.close()
    for parameter in model.parameters():
        with pytest.raises(SessionClosedError):
            parameter.isnan()


# ------------------------------------------------------------------------------------------------- the lanes


@pytest.mark.parametrize("after", [0, 5])
@pytest.mark.parametrize("lane", LANES)
def test_a_failure_on_any_lane_surfaces_soon_with_its_cause(lane: str, after: int, tmp_path: Path) -> None:
    with nothing_stays(tmp_path) as watch:
        lanes = FragileLanes()
        model, optimizer, session = make(tmp_path, lanes=lanes)
        watch(session)
        train(model, optimizer, 1)
        lanes.break_lane(lane, after=after)
        types, _ = failure_of(lambda: train(model, optimizer, 5))
        assert types[-1] is InjectedError
        types, message = failure_of(optimizer.step)
        assert types == [SessionFailedError, InjectedError]
        assert f"failed on lane '{lane}': InjectedError: injected" in message
        assert_session_says_it_failed(session, model, optimizer)


def test_forward_after_a_failure_says_that_the_session_has_failed(tmp_path: Path) -> None:
    with nothing_stays(tmp_path) as watch:
        lanes = FragileLanes()
        model, optimizer, session = make(tmp_path, lanes=lanes)
        watch(session)
        lanes.break_lane("step", after=0)
        failure_of(lambda: train(model, optimizer, 5))
        for _ in range(2):
            types, _ = failure_of(lambda: model(torch.ones(2, 64)))
            assert types == [SessionFailedError, InjectedError]
        session.close()


def test_memory_goes_with_the_error_of_a_failure(tmp_path: Path) -> None:
    held: list[Any] = []
    with nothing_stays(tmp_path) as watch:
        for lane in ("fetch", "h2d", "step", "gradient store"):
            lanes = FragileLanes()
            model, optimizer, session = make(tmp_path, lanes=lanes)
            watch(session)
            held.extend(weakref.ref(region._mapping) for region in session._components.storage._memory._regions)
            held.extend([weakref.ref(session._components.fetcher), weakref.ref(model)])
            train(model, optimizer, 1)
            lanes.break_lane(lane, after=5)
            failure_of(partial(train, model, optimizer, 5))
            session.close()
            del model, optimizer, session, lanes
    assert held
    assert [type(ref()).__name__ for ref in held if ref() is not None] == []


def test_the_list_of_lanes_is_complete(tmp_path: Path) -> None:
    _, _, session = make(tmp_path, lanes=(lanes := FragileLanes()))
    with session:
        assert {lane.name for lane in lanes._lanes} == set(LANES)


def test_an_error_in_a_kernel_surfaces_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Workers.run

    def broken(self: Workers, work: Callable[[int, int], None], first: int, stop: int) -> None:
        run(self, lambda a, b: _fail(), first, stop)

    with nothing_stays(tmp_path) as watch:
        model, optimizer, session = make(tmp_path)
        watch(session)
        train(model, optimizer, 1)
        monkeypatch.setattr(Workers, "run", broken)
        types, _ = failure_of(lambda: train(model, optimizer, 3))
        assert types[-1] is InjectedError
        assert_session_says_it_failed(session, model, optimizer)


# ------------------------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_failed_transfer_names_file_and_offset(direction: str, number: int, tmp_path: Path) -> None:
    def broken() -> None:
        raise OSError(number, os.strerror(number))

    with nothing_stays(tmp_path) as watch:
        disk = FragileDisk()
        model, optimizer, session = make(tmp_path, disk=disk)
        watch(session)
        train(model, optimizer, 1)
        disk.direction, disk.broken = direction, broken
        types, message = failure_of(lambda: train(model, optimizer, 3))
        assert TransferError in types
        assert types[-1] is OSError
        assert f"{direction} of " in message
        assert f"swap file of rank 0 in {tmp_path}" in message
        assert f"(errno {number})" in message
        assert_session_says_it_failed(session, model, optimizer)


def test_a_swap_file_that_ends_too_soon_is_named(tmp_path: Path) -> None:
    with nothing_stays(tmp_path) as watch:
        model, optimizer, session = make(tmp_path)
        watch(session)
        train(model, optimizer, 1)
        session.weights_sha256()  # nothing is in flight
        os.truncate(session._components.storage.swap.files.files[0].path, 0)
        types, message = failure_of(lambda: train(model, optimizer, 3))
        assert TransferError in types
        assert "the file is shorter than it was made" in message
        assert_session_says_it_failed(session, model, optimizer)


@pytest.mark.parametrize("after", [0, 3])
def test_a_write_that_fails_while_the_homes_are_filled_is_named_and_nothing_stays(after: int, tmp_path: Path) -> None:
    num_calls = 0

    def broken() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > after:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = FragileDisk()
    disk.direction, disk.broken = "write", broken
    with nothing_stays(tmp_path):
        types, message = failure_of(lambda: make(tmp_path, disk=disk))
    assert TransferError in types
    assert f"swap file of rank 0 in {tmp_path}" in message


# ------------------------------------------------------------------------------------------------ the user's loop


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InjectedError("injected")


def before_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 64))
    raise InjectedError


def in_forward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert isinstance(model, nn.Sequential)
    model[2].register_forward_pre_hook(lambda *_: _fail())
    model(torch.ones(2, 64))


def in_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert isinstance(model, nn.Sequential)
    model[4](FailsInBackward.apply(model[:4](torch.ones(2, 64)))).sum().backward()


def after_backward(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 64)).sum().backward()
    raise InjectedError


def interrupted(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 64)).sum().backward()
    raise KeyboardInterrupt


@pytest.mark.parametrize("ending", [before_backward, in_forward, in_backward, after_backward, interrupted])
def test_an_exception_of_the_user_ends_the_session_in_order(ending: Loop, tmp_path: Path) -> None:
    expected, optimizer, session = make(tmp_path)
    with session:
        train(expected, optimizer, 2)
    with nothing_stays(tmp_path) as watch:
        model, optimizer, session = make(tmp_path)
        watch(session)

        def loop() -> None:
            with session:
                train(model, optimizer, 2)
                ending(model, optimizer)

        with pytest.raises((InjectedError, KeyboardInterrupt)):
            loop()
        assert_same_bits(weights_of(model), weights_of(expected))  # those of the last whole step


# --------------------------------------------------------------------------------------------------- deadlines


def test_a_kernel_that_never_ends_is_listed_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    with nothing_stays(tmp_path) as watch:
        model, optimizer, session = make(tmp_path, lanes=FragileLanes(wait_timeout_s=0.5))
        watch(session)
        monkeypatch.setattr(Workers, "run", lambda *_: go_on.wait(20.0))
        types, message = failure_of(lambda: train(model, optimizer, 2))
        assert WaitTimeoutError in types
        assert "In flight:\n" in message
        assert "step: step: 0 chunk 0" in message
        go_on.set()
        session.close()


@pytest.mark.parametrize("direction", ["read", "write"])
def test_a_disk_that_never_answers_is_listed_at_the_deadline(direction: str, tmp_path: Path) -> None:
    go_on = threading.Event()
    with nothing_stays(tmp_path) as watch:
        disk = FragileDisk()
        model, optimizer, session = make(tmp_path, lanes=FragileLanes(wait_timeout_s=0.5), disk=disk)
        watch(session)
        train(model, optimizer, 1)
        disk.direction, disk.broken = direction, lambda: go_on.wait(20.0)
        types, message = failure_of(lambda: train(model, optimizer, 3))
        assert WaitTimeoutError in types
        assert f"\n  {direction}: " in message
        assert f"swap file of rank 0 in {tmp_path}, offset" in message
        go_on.set()
        session.close()
