"""Probing tells the truth and leaves nothing behind."""

import errno
import os
from pathlib import Path

import pytest

from offload.disk.probe import free_bytes, takes_direct_io


def test_free_bytes_are_those_of_the_file_system(folder: Path) -> None:
    stat = os.statvfs(folder)
    assert 0 < free_bytes(folder) <= stat.f_blocks * stat.f_frsize


def test_probing_leaves_nothing_behind(folder: Path) -> None:
    assert takes_direct_io(folder) in (True, False)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
def test_a_file_system_that_refuses_only_the_transfer_does_not_take_direct_io(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, name, refuse)
    assert not takes_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_taken_for_one_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(OSError, match="No space left"):
        takes_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []
