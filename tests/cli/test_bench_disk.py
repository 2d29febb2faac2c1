"""`offload bench disk` without other programs: the record for sessions, the result, and what moves the bytes."""

import json
import statistics
from pathlib import Path

import pytest

from offload.cli import bench, bench_disk
from offload.cli.bench_disk import NEARLY
from offload.cli.disk_file import KINDS, TRANSFER_BYTES, UNIT_BYTES, DiskFile, Setting
from offload.cli.exit_codes import FAILED, UNUSABLE
from offload.cli.main import main
from offload.disk.probe import free_bytes
from offload.planning.record import load_record
from offload.units import MIB

ROUNDS = 2


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As from a wheel, in a folder that is no checkout."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bench, "BESIDE_PACKAGE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench_disk, "GRID", (Setting(MIB, 2), Setting(4 * MIB, 4)))
    patch.setattr(bench_disk, "TRY_S", 0.01)
    patch.setattr(bench_disk, "RUN_S", 0.01)


def thriftiest(result: dict, kind: str) -> tuple[int, int]:
    """Request bytes and depth with the fewest bytes in flight, of the settings that were nearly the quickest."""
    rates = {
        (row["request_bytes"], row["depth"]): statistics.median(row["gb_per_s"])
        for row in result["grid"]
        if row["kind"] == kind
    }
    good = [setting for setting, rate in rates.items() if rate >= NEARLY * max(rates.values())]
    return min(good, key=lambda setting: (setting[0] * setting[1], setting[0]))


def test_the_record_is_kept_for_sessions(
    installed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_quick(monkeypatch)
    size = ["--size", "64MiB", "--rounds", str(ROUNDS)]
    assert main(["bench", "disk", "--disk", ".", *size, "--json", "disk.json"]) == 0
    assert "checkout" in capsys.readouterr().out
    result = json.loads((installed / "disk.json").read_text())
    assert {(row["kind"], row["request_bytes"], row["depth"]) for row in result["grid"]} == {
        (kind, setting.request_bytes, setting.depth) for kind in KINDS for setting in bench_disk.GRID
    }
    record = load_record(installed)
    assert record is not None
    assert result["record"] == {name: getattr(record, name) for name in result["record"]}
    assert record.read_request_bytes == thriftiest(result, "read")[0]
    assert record.write_request_bytes == thriftiest(result, "write")[0]
    assert record.depth == thriftiest(result, "mixed")[1]
    for kind in KINDS:
        assert len(result["samples"][kind]) == ROUNDS
        seconds = statistics.median(result["samples"][kind])
        assert getattr(record, f"{kind}_rate") == result["run_bytes"][kind] / seconds
    assert str(installed) not in json.dumps(result)
    assert {path.name for path in installed.iterdir()} == {"cache", "disk.json"}


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = free_bytes(tmp_path)
    assert main(["bench", "disk", "--disk", str(tmp_path), "--size", str(size)]) == FAILED
    assert "--size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [["--disk", "/missing"], ["--disk", ".", "--size", "much"], []])
def test_what_cannot_be_measured_is_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["bench", "disk", *wrong])
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == UNUSABLE
    assert len(capsys.readouterr().err.splitlines()) == 1


# --------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("kind", KINDS)
def test_our_run_moves_every_byte_once(kind: str, tmp_path: Path) -> None:
    with DiskFile(tmp_path, UNIT_BYTES, Setting(4 * MIB, 4), seed=1) as disk:
        before = disk._lanes.timeline.totals()
        assert before == {}
        assert disk.run(kind, Setting(4 * MIB, 4), 6 * TRANSFER_BYTES) > 0
        totals = {lane: total.num_bytes for lane, total in disk._lanes.timeline.totals().items() if total.num_bytes}
        half = 3 * TRANSFER_BYTES
        wanted = {"read": half, "write": half} if kind == "mixed" else {kind: 2 * half}
        assert totals == wanted
    assert list(tmp_path.iterdir()) == []


def test_mixed_runs_never_read_what_they_write(tmp_path: Path) -> None:
    with DiskFile(tmp_path, UNIT_BYTES, Setting(MIB, 1), seed=1) as disk:
        offsets = [disk._offset("mixed", number) for number in range(12)]
    half = UNIT_BYTES // 2
    assert all(offset < half for offset in offsets[::2])
    assert all(half <= offset <= UNIT_BYTES - TRANSFER_BYTES for offset in offsets[1::2])
    assert len(set(offsets)) == 4
