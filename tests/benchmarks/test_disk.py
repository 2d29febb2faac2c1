"""`offload bench disk` in a checkout: what its result holds, that everybody does the same work, that the record is
kept, and what it says where a peer is missing."""

import json
import shutil
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.commands.disk import DEEPSPEED, RATIOS
from benchmarks.commands.fio import FIO_ENGINES, FioFailed, find_fio, seconds_of
from offload.cli import bench_disk
from offload.cli.bench_disk import NEARLY
from offload.cli.disk_file import KINDS, UNIT_BYTES, DiskFile, Setting
from offload.cli.main import main
from offload.planning.record import load_record
from offload.units import MIB

ISSUE_RATIOS = {"read_vs_fio", "write_vs_fio", "mixed_vs_fio", "read_vs_deepspeed", "write_vs_deepspeed"}
ROUNDS = 2
AIO_S = 0.125
"""What the double of DeepSpeed's process says a run took."""
AIO_WORKER = f"""\
import json, os, sys
with os.fdopen(int(sys.argv[2]), "w", buffering=1) as answers:
    for line in sys.stdin:
        prepared = {{"versions": {{"deepspeed": "9.9"}}}}
        answers.write(json.dumps(prepared if line.startswith("prepare") else {{"seconds": {AIO_S}}}) + "\\n")
"""
FIO = """#!/bin/sh
echo '{"jobs": [{"error": 0, "read": {"io_bytes": 4194304, "runtime": 4}, "write": {"io_bytes": 0, "runtime": 0}}]}'
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one small run; DeepSpeed's process and fio are doubles that speak their protocols."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "worker.py").write_text(AIO_WORKER)
    (folder / "bin").mkdir()
    programs = {
        folder / "python": f'#!/bin/sh\nexec "{sys.executable}" "{folder}/worker.py" "$@"\n',
        folder / "bin" / "fio": FIO,
    }
    for program, text in programs.items():
        program.write_text(text)
        program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
        make_quick(patch)
        code = main(
            ["bench", "disk", "--path", str(folder), "--size", "64MiB", "--rounds", str(ROUNDS),
             "--json", str(folder / "disk.json"), "--deepspeed-python", str(folder / "python")]
        )  # fmt: skip
    assert code == 0
    return folder


def make_quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bench_disk, "GRID", (Setting(MIB, 2), Setting(4 * MIB, 4)))
    patch.setattr(bench_disk, "TRY_S", 0.01)
    patch.setattr(bench_disk, "RUN_S", 0.01)


@pytest.fixture(scope="module")
def result(folder: Path) -> dict:
    return json.loads((folder / "disk.json").read_text())


def test_the_ratios_are_those_of_the_samples(result: dict) -> None:
    assert result["ratios"].keys() == RATIOS.keys() == ISSUE_RATIOS
    for name, (over, under) in result["ratio_terms"].items():
        kind = name.partition("_")[0]
        assert under == f"{kind}/offload"
        rounds = [a / b for a, b in zip(result["samples"][over], result["samples"][under], strict=True)]
        assert result["ratios"][name] == statistics.median(rounds)


def test_every_round_of_every_contender_is_kept(result: dict) -> None:
    names = {f"{kind}/{name}" for kind in KINDS for name in ("offload", *FIO_ENGINES)}
    names |= {f"{kind}/{DEEPSPEED}" for kind in ("read", "write")}
    assert result["samples"].keys() == result["contenders"].keys() == result["best"].keys() == names
    assert all(len(samples) == ROUNDS for samples in result["samples"].values())
    assert result["samples"]["read/deepspeed"] == [AIO_S] * ROUNDS
    for name, figures in result["contenders"].items():
        assert figures["bytes"] == result["run_bytes"][name.partition("/")[0]]


def test_everybody_was_tried_at_the_same_settings(result: dict) -> None:
    tried: dict = {}
    for row in result["grid"]:
        assert len(row["gb_per_s"]) == 1
        tried.setdefault((row["kind"], row["contender"]), []).append((row.get("request_bytes"), row["depth"]))
    for kind in KINDS:
        for name in ("offload", *FIO_ENGINES):
            assert tried[kind, name] == [(MIB, 2), (4 * MIB, 4)]


def test_the_result_says_what_disk_and_names_no_place(result: dict, folder: Path) -> None:
    assert result["disk"]["file_bytes"] == 64 * MIB
    assert result["disk"]["mode"] in ("direct", "buffered")
    assert "bench disk" in result["command"]
    assert str(folder) not in json.dumps(result)


def test_a_chart_lies_beside_the_result(folder: Path) -> None:
    ElementTree.parse(folder / "disk.svg")


def thriftiest(result: dict, kind: str) -> tuple[int, int]:
    """Request bytes and depth with the fewest bytes in flight, of our settings that were nearly the quickest."""
    rates = {
        (row["request_bytes"], row["depth"]): statistics.median(row["gb_per_s"])
        for row in result["grid"]
        if (row["kind"], row["contender"]) == (kind, "offload")
    }
    good = [setting for setting, rate in rates.items() if rate >= NEARLY * max(rates.values())]
    return min(good, key=lambda setting: (setting[0] * setting[1], setting[0]))


def test_the_record_is_kept_for_sessions(folder: Path, result: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    record = load_record(folder)
    assert record is not None
    assert record.read_request_bytes == thriftiest(result, "read")[0]
    assert record.write_request_bytes == thriftiest(result, "write")[0]
    assert record.depth == thriftiest(result, "mixed")[1]
    for kind in KINDS:
        seconds = statistics.median(result["samples"][f"{kind}/offload"])
        assert getattr(record, f"{kind}_rate") == result["run_bytes"][kind] / seconds


def test_only_what_was_asked_for_is_left(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"bin", "cache", "disk.json", "disk.svg", "python", "worker.py"}


def test_peers_that_are_not_there_are_rows_that_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    make_quick(monkeypatch)
    assert main(["bench", "disk", "--disk", str(tmp_path), "--size", "64MiB", "--rounds", "1", "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ratios"] == dict.fromkeys(ISSUE_RATIOS)
    assert "apt-get install fio" in result["contenders"]["mixed/io_uring"]["absent"]
    assert "absent" in result["contenders"]["write/deepspeed"]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


# -------------------------------------------------------------------------------------------------- contenders


def test_the_time_of_fio_is_that_of_the_bytes_asked_for() -> None:
    job = {"error": 0, "read": {"io_bytes": 300, "runtime": 2000}, "write": {"io_bytes": 100, "runtime": 1000}}
    text = "fio: a warning\n" + json.dumps({"jobs": [job]})
    assert seconds_of(text, "", 200) == 1.0


@pytest.mark.parametrize(
    ("answer", "complaints", "words"),
    [
        ("", "fio: engine io_uring not loadable\n", "not loadable"),
        ("", "", "without a word"),
        ('{"jobs": []}', "", "jobs"),
        ('{"jobs": [{"error": 5, "read": {"io_bytes": 8, "runtime": 1}, "write": {"io_bytes": 0}}]}', "", "error 5"),
        ('{"jobs": [{"error": 0, "read": {"io_bytes": 0}, "write": {"io_bytes": 0}}]}', "denied", "denied"),
    ],
)
def test_an_answer_of_fio_without_figures_is_an_error(answer: str, complaints: str, words: str) -> None:
    with pytest.raises(FioFailed, match=words):
        seconds_of(answer, complaints, 100)


def test_fio_where_it_is_installed_moves_what_was_asked_for(tmp_path: Path) -> None:
    with DiskFile(tmp_path, UNIT_BYTES, Setting(MIB, 4), seed=1) as disk:
        fio = find_fio("libaio", disk.file)
        if shutil.which("fio") is None:
            assert "apt-get" in fio.reason
            return
        for kind in KINDS:
            assert fio.run(kind, Setting(MIB, 4), 32 * MIB) > 0
        assert disk.file.path.stat().st_size == UNIT_BYTES
