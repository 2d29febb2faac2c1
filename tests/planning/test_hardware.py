"""What the machine has free, with cgroups."""

from pathlib import Path

from offload.planning.hardware import default_disk_budget, free_host_bytes, training_threads


def test_a_limit_anywhere_up_the_cgroup_tree_counts(tmp_path: Path) -> None:
    leaf = tmp_path / "fs" / "outer" / "inner"
    leaf.mkdir(parents=True)
    (leaf / "memory.max").write_text("max\n")
    (leaf / "memory.current").write_text("5\n")
    (leaf.parent / "memory.max").write_text("3000\n")
    (leaf.parent / "memory.current").write_text("1000\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/outer/inner\n")
    assert free_host_bytes(tmp_path / "fs", own) == 2000


def test_version_1_cgroups_count_too(tmp_path: Path) -> None:
    leaf = tmp_path / "fs" / "memory" / "job"
    leaf.mkdir(parents=True)
    (leaf / "memory.limit_in_bytes").write_text("4096\n")
    (leaf / "memory.usage_in_bytes").write_text("96\n")
    own = tmp_path / "cgroup"
    own.write_text("3:cpu:/job\n2:memory:/job\n")
    assert free_host_bytes(tmp_path / "fs", own) == 4000


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path, tmp_path / "none") > 0


def test_one_file_system_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, both = default_disk_budget([tmp_path / "a"]), default_disk_budget([tmp_path / "a", tmp_path / "b"])
    assert abs(one - both) < one // 10


def test_there_is_always_a_kernel_thread() -> None:
    assert training_threads() >= 1
