"""The hardware record: kept by host and mount, replaced whole, and never trusted when damaged."""

import dataclasses
import json
import logging
import platform
from pathlib import Path

import pytest

from offload.errors import InternalError
from offload.planning.record import DiskRecord, load_record, mount_of, record_path, save_record
from offload.units import MIB

RECORD = DiskRecord(
    read_request_bytes=4 * MIB, write_request_bytes=8 * MIB, depth=8,
    read_rate=2.5e9, write_rate=1.5e9, mixed_rate=1.75e9, measured_at=1_700_000_000.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_saved_is_loaded_for_every_folder_of_that_mount(tmp_path: Path, cache: Path) -> None:
    assert load_record(tmp_path) is None
    path = save_record(tmp_path, RECORD)
    assert path.is_relative_to(cache)
    (tmp_path / "below").mkdir()
    assert load_record(tmp_path) == load_record(tmp_path / "below") == RECORD


def test_another_mount_has_another_record(tmp_path: Path) -> None:
    assert mount_of(tmp_path) != mount_of(Path("/dev/shm")), "the tests need /dev/shm and a disk"
    save_record(tmp_path, RECORD)
    assert load_record(Path("/dev/shm")) is None


def test_another_host_on_the_same_home_has_another_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_record(tmp_path, RECORD)
    monkeypatch.setattr(platform, "node", lambda: "another")
    assert load_record(tmp_path) is None


def test_saving_again_replaces_the_record_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    save_record(tmp_path, RECORD)
    newer = dataclasses.replace(RECORD, depth=16)
    path = save_record(tmp_path, newer)
    assert load_record(tmp_path) == newer
    assert list(path.parent.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_record_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_record(tmp_path, RECORD)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="full"):
        save_record(tmp_path, dataclasses.replace(RECORD, depth=16))
    assert list(path.parent.iterdir()) == [path]
    assert load_record(tmp_path) == RECORD


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\xff\xfe",
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"depth": 8', '"depth": 0'),
        lambda text: text.replace('"depth": 8', '"depth": "many"'),
        lambda text: text.replace('"depth"', '"deepness"'),
        lambda text: text.replace(str(4 * MIB), "5000"),
        lambda text: text.replace("2500000000.0", "NaN"),
    ],
)
def test_a_damaged_record_is_none_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    path = save_record(tmp_path, RECORD)
    before = path.read_text()
    path.write_text(damage(before), encoding="latin-1")  # type: ignore[operator]
    assert path.read_text(encoding="latin-1") != before
    with caplog.at_level(logging.WARNING):
        assert load_record(tmp_path) is None
    assert [f"offload bench disk --disk {tmp_path}" in record.message for record in caplog.records] == [True]


def test_without_a_cache_variable_the_record_lies_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert record_path(tmp_path).parent == tmp_path / ".cache" / "offload"


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"read_request_bytes": 100}, {"mixed_rate": float("nan")}])
def test_what_no_disk_can_do_makes_no_record(wrong: dict[str, float]) -> None:
    with pytest.raises(InternalError):
        dataclasses.replace(RECORD, **wrong)


def test_the_innermost_and_last_mount_counts(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw shared:1 - ext4 /dev/root rw\n"
        f"2 1 8:2 / {tmp_path} rw - xfs /dev/first rw\n"
        f"3 1 8:3 / {tmp_path}/with\\040space rw - ext4 /dev/second rw\n"
        f"4 1 8:4 / {tmp_path} rw - btrfs /dev/last rw\n"
        "damaged\n"
    )
    assert mount_of(Path("/"), mounts) == ("/", "ext4 /dev/root")
    assert mount_of(tmp_path / "a", mounts) == (str(tmp_path), "btrfs /dev/last")
    assert mount_of(tmp_path / "with space", mounts) == (f"{tmp_path}/with space", "ext4 /dev/second")
    assert mount_of(tmp_path, tmp_path / "missing") == ("/", "unknown")
