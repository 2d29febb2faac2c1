"""The bytes that `offload train` trains on: which, in which order, and which windows of them."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from offload.cli.text import Text, Windows, open_text
from offload.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a.txt").write_bytes(b"first ")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_bytes(b" third")
    (tmp_path / "image.bin").write_bytes(b"\x89\0\0")
    (tmp_path / ".hidden").write_bytes(b"hidden")
    return tmp_path


def test_a_folder_is_its_text_files_in_the_order_of_their_paths(folder: Path) -> None:
    text = open_text(folder)
    assert text.num_files == 3
    assert text.read(0, text.num_bytes) == b"first second third"


def test_every_window_is_the_same_however_files_are_cut(folder: Path) -> None:
    text = open_text(folder)
    whole = text.read(0, text.num_bytes)
    for start in range(text.num_bytes):
        for stop in range(start, text.num_bytes + 1):
            assert text.read(start, stop - start) == whole[start:stop]


def test_the_default_text_is_the_standard_library_alone() -> None:
    text = open_text(None)
    assert text.num_bytes > 5_000_000
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all(path.suffix == ".py" and path.is_relative_to(root) for path in text._paths)
    assert not [path for path in text._paths if "site-packages" in path.parts]


def test_the_same_seed_draws_the_same_windows(folder: Path) -> None:
    def draw_all(seed: int) -> np.ndarray:
        windows = Windows(open_text(folder), batch=3, seq=5, seed=seed)
        return np.stack([windows.draw() for _ in range(4)])

    first = draw_all(1)
    assert first.shape == (4, 3, 6)
    np.testing.assert_array_equal(first, draw_all(1))
    assert not np.array_equal(first, draw_all(2))


def test_every_byte_of_the_text_is_drawn_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "all").write_bytes(bytes(range(1, 101)))
    windows = Windows(open_text(tmp_path / "all"), batch=8, seq=9, seed=0)
    seen = {int(byte) for _ in range(200) for byte in windows.draw().ravel()}
    assert seen == set(range(1, 101))


def test_a_text_shorter_than_one_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 8)
    with pytest.raises(ConfigError, match="8 bytes, one window of --seq 8 needs 9"):
        Windows(open_text(tmp_path / "short"), batch=1, seq=8, seed=0)


@pytest.mark.parametrize("name", ["missing", "empty.txt", "nothing"])
def test_what_holds_no_text_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / "nothing").mkdir()
    with pytest.raises(ConfigError, match=name):
        open_text(folder / name)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_bytes(b"0123456789")
    text = Text([path])
    path.write_bytes(b"0123")
    with pytest.raises(ConfigError, match=r"log\.txt: wanted 10 bytes at 0, got 4"):
        text.read(0, 10)
