"""Files of results: where they lie, how they are laid out, and what they say of the machine."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.report.results import (
    as_json,
    check_result_path,
    cpu_name,
    machine_facts,
    vector_features,
    write_result,
)

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


def test_there_is_one_file(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert write_result(str(file), {}) == [file]
    assert list(tmp_path.iterdir()) == [file]


def test_a_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert write_result("-", {"numel": 5}) == []
    assert json.loads(capsys.readouterr().out) == {"numel": 5}


@pytest.mark.parametrize("name", ["", "no/such/folder/out.json"])
def test_a_path_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json"):
        check_result_path(str(tmp_path / name))


@pytest.mark.parametrize("path", [None, "-"])
def test_no_file_is_always_fine(path: str | None) -> None:
    check_result_path(path)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_the_layout_changes_no_value(value: Any) -> None:
    assert json.loads(as_json(value)) == value


def test_samples_take_a_line_however_many_there_are() -> None:
    samples = {"ours": [0.1] * 300, "theirs": [1.5] * 300}
    assert as_json({"seed": 1, "samples": samples}).splitlines() == [
        "{",
        '  "seed": 1,',
        '  "samples": {',
        f'    "ours": {[0.1] * 300},',
        f'    "theirs": {[1.5] * 300}',
        "  }",
        "}",
    ]


def test_a_short_row_of_figures_takes_a_line() -> None:
    rows = [{"kind": kind, "depth": 8, "gb_per_s": [1.0, 2.0]} for kind in ("read", "write", "mixed")]
    assert '    {"kind": "mixed", "depth": 8, "gb_per_s": [1.0, 2.0]}' in as_json({"grid": rows}).splitlines()
