"""The threads that run kernels."""

import gc
import os
import threading
import weakref
from pathlib import Path

import pytest

from offload.kernels.workers import TASK_NUMEL, Workers, cpus_near
from offload.units import BLOCK_NUMEL


@pytest.mark.parametrize("num_threads", [1, 2, 3, 9])
def test_borders_are_the_same_whatever_the_number_of_threads(num_threads: int) -> None:
    seen: list[tuple[int, int]] = []
    with Workers(num_threads) as workers:
        workers.run(lambda a, b: seen.append((a, b)), 100, 2 * TASK_NUMEL + 5)
    assert sorted(seen) == [(100, TASK_NUMEL), (TASK_NUMEL, 2 * TASK_NUMEL), (2 * TASK_NUMEL, 2 * TASK_NUMEL + 5)]


def test_tasks_are_whole_blocks() -> None:
    assert TASK_NUMEL % BLOCK_NUMEL == 0


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (TASK_NUMEL, TASK_NUMEL)])
def test_an_empty_range_runs_nothing(start: int, stop: int) -> None:
    with Workers(2) as workers:
        workers.run(lambda a, b: pytest.fail(f"ran {a}, {b}"), start, stop)


@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_an_error_is_raised_after_all_tasks_have_ended(num_threads: int) -> None:
    ended: list[int] = []

    def work(a: int, b: int) -> None:
        ended.append(a)
        if a in (TASK_NUMEL, 3 * TASK_NUMEL):
            raise ValueError(f"task {a // TASK_NUMEL}")

    with Workers(num_threads) as workers:
        for _ in range(2):  # the workers go on living
            with pytest.raises(ValueError, match="task 1"):
                workers.run(work, 0, 5 * TASK_NUMEL)
            assert sorted(ended) == [i * TASK_NUMEL for i in range(5)]
            ended.clear()


def test_as_many_threads_work_at_once_as_were_asked_for() -> None:
    barrier = threading.Barrier(3, timeout=60)
    with Workers(3) as workers:
        workers.run(lambda a, b: barrier.wait() and None, 0, 3 * TASK_NUMEL)


def test_one_thread_means_the_callers() -> None:
    seen = set()
    with Workers(1) as workers:
        workers.run(lambda a, b: seen.add(threading.get_ident()), 0, 3 * TASK_NUMEL)
    assert seen == {threading.get_ident()}


def test_several_callers_and_calls_within_calls_all_end() -> None:
    totals = [0, 0, 0]
    lock = threading.Lock()

    def call(caller: int, workers: Workers) -> None:
        def inner(a: int, b: int) -> None:
            with lock:
                totals[caller] += b - a

        workers.run(lambda a, b: workers.run(inner, a, b), 0, 4 * TASK_NUMEL)

    with Workers(2) as workers:
        callers = [threading.Thread(target=call, args=(i, workers)) for i in range(3)]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join(60)
    assert totals == [4 * TASK_NUMEL] * 3


def test_closing_ends_the_threads_and_the_caller_can_still_run() -> None:
    before = threading.active_count()
    workers = Workers(3)
    assert threading.active_count() == before + 2
    workers.close()
    workers.close()
    assert threading.active_count() == before
    seen: list[int] = []
    workers.run(lambda a, b: seen.append(a), 0, 2 * TASK_NUMEL)
    assert seen == [0, TASK_NUMEL]


def test_threads_at_rest_keep_nothing_alive() -> None:
    class Work:
        def __call__(self, a: int, b: int) -> None: ...

    with Workers(2) as workers:
        work = Work()
        died = threading.Event()
        weakref.finalize(work, died.set)
        workers.run(work, 0, 4 * TASK_NUMEL)
        del work
        gc.collect()
        assert died.wait(60)


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """A sysfs with two nodes of eight CPUs, whose hyper-threads are numbered apart, and a node of memory alone."""
    for node, text in enumerate(("0-3,8-11\n", "4-7,12,13-15\n", "\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(text)
    return tmp_path


def test_cpus_near_a_node_are_its_own_as_far_as_they_are_allowed(two_nodes: Path) -> None:
    assert cpus_near(0, range(16), two_nodes) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert cpus_near(1, range(16), two_nodes) == {4, 5, 6, 7, 12, 13, 14, 15}
    assert cpus_near(1, {2, 5, 13}, two_nodes) == {5, 13}


@pytest.mark.parametrize("node", [-1, 2, 7])
def test_all_cpus_are_near_a_node_that_is_unknown_or_has_none(two_nodes: Path, node: int) -> None:
    assert cpus_near(node, {1, 5}, two_nodes) == {1, 5}


def test_all_cpus_are_near_a_node_whose_own_are_not_allowed(two_nodes: Path) -> None:
    assert cpus_near(1, {0, 1}, two_nodes) == {0, 1}


def test_this_machine_has_cpus_near_its_first_node() -> None:
    assert cpus_near(0, os.sched_getaffinity(0)) <= os.sched_getaffinity(0)


def test_workers_run_on_the_cpus_they_are_given_and_the_caller_keeps_its_own() -> None:
    before = os.sched_getaffinity(0)
    chosen = {max(before)}
    seen: dict[str, set[int]] = {}
    barrier = threading.Barrier(3, timeout=60)

    def work(a: int, b: int) -> None:
        barrier.wait()
        seen[threading.current_thread().name] = os.sched_getaffinity(0)

    with Workers(3, cpus=chosen) as workers:
        workers.run(work, 0, 3 * TASK_NUMEL)
        caller = seen.pop(threading.current_thread().name)
        assert list(seen.values()) == [chosen, chosen]
        assert caller == before
    assert os.sched_getaffinity(0) == before


def test_cpus_that_this_process_may_not_use_are_refused() -> None:
    with pytest.raises(ValueError, match=r"workers on CPUs \[100000\]: this process may run on"):
        Workers(2, cpus={100_000})
