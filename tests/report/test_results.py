"""Files of results: where they lie, and what they say of machine and command."""

import json
import platform
from pathlib import Path

import pytest

from offload.errors import ConfigError
from offload.report.results import (
    check_result_path,
    command_of,
    cpu_name,
    machine_facts,
    vector_features,
    versions,
    write_result,
)

REPOSITORY = Path("/home/somebody/offload")
CPUINFO = """\
processor\t: 0
cpu family\t: 26
model\t\t: 2
model name\t: A Chip of 2 GHz
flags\t\t: fpu avx2 avx512f sse

processor\t: 1
model name\t: Another
flags\t\t: fpu fma
"""


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("/home/somebody/offload/benchmarks/out.json", "benchmarks/out.json"),
        ("--json=/home/somebody/offload/out.json", "--json=out.json"),
        ("/home/somebody/secret/out.json", ".../out.json"),
        ("--json=/tmp/out.json", "--json=.../out.json"),
        ("/home/somebody/offload/../secret/out.json", ".../out.json"),
        ("benchmarks/out.json", "benchmarks/out.json"),
        ("--numel=5", "--numel=5"),
        ("-", "-"),
    ],
)
def test_a_command_shows_no_path_outside_the_repository(argument: str, shown: str) -> None:
    assert command_of(["bench", argument], REPOSITORY) == f"offload bench {shown}"


def test_the_first_cpu_is_named_with_what_it_can_do() -> None:
    assert cpu_name(CPUINFO) == "A Chip of 2 GHz (cpu family 26, model 2)".replace("cpu family", "family")
    assert vector_features(CPUINFO) == ["avx2", "avx512f"]
    assert cpu_name("") == ""
    assert vector_features("") == []


def test_the_machine_is_told_without_its_name() -> None:
    facts = machine_facts()
    assert facts["cores"] >= facts["cores_allowed"] >= 1
    assert facts["memory_bytes"] > facts["free_memory_bytes"] > 0
    assert platform.node() not in json.dumps(facts).split('"')


def test_versions_of_what_is_not_installed_are_left_out() -> None:
    found = versions(["numpy", "no-such-distribution"])
    assert found["python"] == platform.python_version()
    assert "numpy" in found
    assert "no-such-distribution" not in found


def test_the_chart_lies_beside_the_json(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert write_result(str(file), {"ratios": {"speed": 2.0}}, "<svg/>") == [file, tmp_path / "run.svg"]
    assert json.loads(file.read_text()) == {"ratios": {"speed": 2.0}}
    assert (tmp_path / "run.svg").read_text() == "<svg/>"


def test_without_a_chart_there_is_one_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert write_result(str(file), {}) == [file]
    assert list(tmp_path.iterdir()) == [file]


def test_a_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_result("-", {"numel": 5}, "<svg/>") == []
    assert json.loads(capsys.readouterr().out) == {"numel": 5}


@pytest.mark.parametrize("name", ["", "no/such/folder/out.json", "out.svg"])
def test_a_path_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json"):
        check_result_path(str(tmp_path / name))


@pytest.mark.parametrize("path", [None, "-"])
def test_no_file_is_always_fine(path: str | None) -> None:
    check_result_path(path)
