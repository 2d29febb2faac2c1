"""Files of a benchmark's results: the chart beside them, and what they say of command and versions."""

import json
import platform
from pathlib import Path

import pytest

from benchmarks.measure.result import check_result_path, command_of, versions, write_result
from offload.errors import ConfigError

REPOSITORY = Path("/home/somebody/offload")


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


def test_standard_output_has_no_chart(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_result("-", {"numel": 5}, "<svg/>") == []
    assert json.loads(capsys.readouterr().out) == {"numel": 5}


@pytest.mark.parametrize("name", ["", "no/such/folder/out.json", "out.svg"])
def test_a_path_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json"):
        check_result_path(str(tmp_path / name))
