"""What every test gets: printed seeds, a check for leaks, and skips that CI does not let pass.

Owns: the fixtures `seed`, `rng` and the autouse check for leaked threads, descriptors and swap folders; the marker
`gpu`; the rule that a skipped test is a failure on CI; how many workers `-n auto` starts, and the threads of torch.
Does not: make devices, models or sessions (the folders of the areas).
"""

import gc
import os
import random
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

ON_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}
THREAD_END_S = 5.0
HERE = Path(__file__).parent
WITH_TINY_MODELS = {"mutation", "races", "stress", "training"}
"""Folders whose tests run with one thread of torch's."""
MOST_WORKERS = 8
"""Of `-n auto`: each imports torch and transformers, and the longest file takes an eighth of the whole run."""

hypothesis.settings.register_profile("offload", deadline=None, print_blob=True, derandomize=ON_CI)
hypothesis.settings.load_profile("offload")


_own_cache = tempfile.TemporaryDirectory(prefix="offload-tests-cache-")
os.environ["XDG_CACHE_HOME"] = _own_cache.name  # plans must not depend on what was measured on this machine


# ----------------------------------------------------------------------------------------------------- workers


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: one for each CPU, hyperthreads too (what xdist counts are cores: one of two)."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_configure() -> None:
    """Workers share the CPUs: with threads for all of them in each, most of their time would be spent in switches."""
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_workers > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # of the processes that tests start


@pytest.fixture(autouse=True)
def one_torch_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where models are tiny, torch's own threads gain nothing and would compete with the lanes for the cores."""
    before = torch.get_num_threads()
    if request.path.relative_to(HERE).parts[0] in WITH_TINY_MODELS:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_is_not_walked() -> None:
    """What is alive when a file's tests begin takes no part in collections from then on.

    Every session ends with one, which would walk the millions of objects of torch, numba and transformers each time:
    longer than most tests take.
    """
    gc.collect()
    gc.freeze()


# ------------------------------------------------------------------------------------------------------- skips


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.accelerator.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no accelerator"))


def _fail_where_skipped(report: pytest.TestReport | pytest.CollectReport) -> None:
    """On CI nothing is skipped in silence: a missing package or file is a failure."""
    if ON_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: skipped on CI ({reason}); only tests marked gpu may be."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if item.get_closest_marker("gpu") is None:
        _fail_where_skipped(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    _fail_where_skipped(report)
    return report


# ------------------------------------------------------------------------------------------------------- seeds


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """The test's own seed, printed where it fails; OFFLOAD_TEST_SEED sets it for all tests."""
    value = int(os.environ.get("OFFLOAD_TEST_SEED", zlib.crc32(request.node.nodeid.encode())))
    print(f"seed {value} (OFFLOAD_TEST_SEED={value} repeats it)")  # noqa: T201 - pytest shows it on failure
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """A generator of the test's own."""
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------------------- leaks


def _our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("offload")}


def _open_files() -> dict[int, str]:
    """What each descriptor of this process refers to."""
    files = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            files[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
    return {fd: name for fd, name in files.items() if not name.startswith("/dev/nvidia")}  # the driver's own, for good


def _new_files(before: dict[int, str]) -> list[str]:
    return sorted(f"{fd} -> {name}" for fd, name in _open_files().items() if before.get(fd) != name)


def _swap_folders(root: Path) -> list[str]:
    return sorted(str(folder) for folder in root.rglob("offload-*-rank*") if folder.is_dir())


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads of ours, open descriptors and swap folders are after the test what they were before."""
    root = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    threads, files = _our_threads(), _open_files()
    yield
    if _new_files(files) or _our_threads() - threads:
        gc.collect()  # what only a cycle keeps alive is not a leak
    for thread in _our_threads() - threads:
        thread.join(THREAD_END_S)
    left = [f"thread {thread.name}" for thread in _our_threads() - threads]
    left += [f"descriptor {name}" for name in _new_files(files)]
    left += [f"swap folder {folder}" for folder in (_swap_folders(root) if root is not None else [])]
    assert not left, f"left behind: {left}"
