"""`offload bench` where the benchmarks of a checkout are absent, and where they are."""

import subprocess
import sys
from pathlib import Path

import pytest

from offload.cli import bench
from offload.cli.exit_codes import UNUSABLE
from offload.cli.main import main


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a wheel, in a folder that is no checkout."""
    monkeypatch.setattr(bench, "BESIDE_PACKAGE", tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("name", ["adam", "step", "overlap"])
@pytest.mark.parametrize("arguments", [[], ["--numel", "5"], ["--json=-"], ["--help"]])
def test_a_benchmark_without_a_checkout_says_in_one_line_what_it_needs(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", name, *arguments]) == UNUSABLE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert f"`offload bench {name}` needs a checkout" in err


@pytest.mark.usefixtures("nowhere")
def test_the_current_directory_may_be_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit) as ended:
        main(["bench", "adam", "--numel", "0"])
    assert ended.value.code == UNUSABLE
    assert "--numel" in capsys.readouterr().err


def test_training_loads_no_benchmark() -> None:
    program = (
        "import sys\n"
        "from offload.cli.main import build_parser\n"
        "build_parser(['train'])\n"
        "sys.exit(any(name.partition('.')[0] == 'benchmarks' for name in sys.modules))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
