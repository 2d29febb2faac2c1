"""Limits of control groups, read from folders laid out as the kernel does."""

from pathlib import Path

import pytest

from offload.planning.hardware import (
    DISK_SHARE,
    default_disk_budget,
    free_disk_bytes,
    free_host_bytes,
    training_threads,
)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "fs").mkdir()
    return tmp_path


def lay_out(tree: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, content in files.items():
        path = tree / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    (tree / "cgroup").write_text(own + "\n")
    return tree / "fs", tree / "cgroup"


def test_pages_of_files_not_used_lately_count_as_free(tree: Path) -> None:
    at = {"a/memory.max": "9000", "a/memory.current": "8000", "a/memory.stat": "anon 1000\ninactive_file 6000"}
    assert free_host_bytes(*lay_out(tree, "0::/a", at)) == 7000


def test_version_1_counts_them_too(tree: Path) -> None:
    at = {
        "memory/a/memory.limit_in_bytes": "9000",
        "memory/a/memory.usage_in_bytes": "8000",
        "memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 6000",
    }
    assert free_host_bytes(*lay_out(tree, "4:memory:/a\n0::/", at)) == 7000


def test_usage_beyond_the_limit_leaves_nothing(tree: Path) -> None:
    assert free_host_bytes(*lay_out(tree, "0::/a", {"a/memory.max": "10", "a/memory.current": "30"})) == 0


def test_in_a_container_the_mounted_root_counts_where_the_path_is_the_hosts(tree: Path) -> None:
    at = {"memory.max": "5000", "memory.current": "1000"}
    assert free_host_bytes(*lay_out(tree, "0::/docker/0123", at)) == 4000


@pytest.mark.parametrize("content", ["max", "", "nonsense"])
def test_no_limit_leaves_the_machine(tree: Path, content: str) -> None:
    with_limit = free_host_bytes(*lay_out(tree, "0::/", {"memory.max": content, "memory.current": "1"}))
    assert with_limit > 1 << 20


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/a", {"a/cpu.max": "150000 100000"}),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}),
        ("2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}),
    ],
)
def test_a_quota_of_cores_leaves_one_kernel_thread_at_least(tree: Path, own: str, files: dict[str, str]) -> None:
    assert training_threads(*lay_out(tree, own, files)) == 1


def test_a_quota_of_minus_one_is_none(tree: Path) -> None:
    at = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}
    assert training_threads(*lay_out(tree, "2:cpu:/", at)) == training_threads(*lay_out(tree, "0::/", {}))


def test_a_folder_not_yet_made_lies_on_its_parents_file_system(tmp_path: Path) -> None:
    made, missing = free_disk_bytes([tmp_path]), free_disk_bytes([tmp_path / "not" / "yet", tmp_path])
    assert abs(made - missing) < made // 10
    assert default_disk_budget([tmp_path]) <= made * (DISK_SHARE + 0.01)
