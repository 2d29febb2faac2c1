"""Failures in flight: they surface with their cause, nothing hangs, nothing is left behind."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import SessionFailedError, TransferError, WaitTimeoutError
from offload.session import Session


def make(folder: Path, **more: Any) -> tuple[nn.Module, torch.optim.Optimizer, Session]:
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = offload.enable(
        model,
        optimizer,
        device="cpu",
        device_memory="40KiB",
        host_memory="180KiB",
        disk=folder,
        precision="fp32",
        **more,
    )
    return model, optimizer, session


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_nothing_is_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("offload")] == []


def test_an_error_in_a_kernel_surfaces_at_the_next_call_with_its_cause(tmp_path: Path) -> None:
    model, optimizer, session = make(tmp_path)

    def broken(*_: Any, **__: Any) -> None:
        raise FloatingPointError("injected")

    session._pipeline._stepper.step = broken
    start_s = time.monotonic()
    with pytest.raises((SessionFailedError, FloatingPointError)) as caught, session:
        train(model, optimizer, 3)
    assert time.monotonic() - start_s < 5.0
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, FloatingPointError):
        error = error.__cause__
    assert error is not None
    del error, caught
    assert_nothing_is_left(tmp_path)


def test_a_swap_file_that_breaks_names_path_and_offset(tmp_path: Path) -> None:
    model, optimizer, session = make(tmp_path)
    with pytest.raises((SessionFailedError, TransferError), match=r"swap\.bin"), session:
        train(model, optimizer, 1)
        session.weights_sha256()
        nothing = os.open("/dev/null", os.O_RDWR)
        os.dup2(nothing, session._storage._files.files[0].descriptor)  # every read now ends at once
        os.close(nothing)
        train(model, optimizer, 3)
    assert_nothing_is_left(tmp_path)


def test_an_exception_of_the_user_ends_the_session_in_order(tmp_path: Path) -> None:
    model, optimizer, session = make(tmp_path)
    with pytest.raises(KeyError), session:
        train(model, optimizer, 2)
        model(torch.ones(2, 64)).sum().backward()
        raise KeyError
    assert_nothing_is_left(tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_wait_that_nothing_ends_raises_at_its_deadline_and_lists_what_is_in_flight(tmp_path: Path) -> None:
    model, optimizer, session = make(tmp_path, wait_timeout_s=0.5)
    held = threading.Event()

    def stalled(*_: Any, **__: Any) -> None:
        held.wait(20.0)

    session._pipeline._stepper.step = stalled
    try:
        with pytest.raises((WaitTimeoutError, SessionFailedError), match="In flight") as caught:
            train(model, optimizer, 2)
        assert "step" in str(caught.value)
        del caught
    finally:
        held.set()
        session.close(give_back=False)
    assert_nothing_is_left(tmp_path)


def test_sessions_one_after_another_leave_no_memory_thread_or_descriptor(tmp_path: Path) -> None:
    def once() -> None:
        model, optimizer, session = make(tmp_path)
        with pytest.raises(KeyError), session:
            train(model, optimizer, 10)
            raise KeyError

    def mapped_regions() -> int:
        return sum("rw-p 00000000 00:00 0" in line for line in Path("/proc/self/maps").read_text().splitlines())

    once()
    descriptors, regions = len(os.listdir("/proc/self/fd")), mapped_regions()
    for _ in range(5):
        once()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert mapped_regions() <= regions + 5
    assert_nothing_is_left(tmp_path)
