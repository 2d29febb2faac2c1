"""How kernels are compiled: the cache on disk, and machines without a place for it or without instructions."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
STEP = (
    "import numpy as np\n"
    "from offload.kernels import adam\n"
    "kernel = adam.step_kernel('bf16', 'bf16')\n"
    "state = [np.ones(17, np.float32) for _ in range(3)]\n"
    "bits = [np.full(17, 0x3F80, np.uint16) for _ in range(2)]\n"
    "kernel(*state, *bits, 0, 0.5, 0.9, 0.99, 0.0, 0.0, 1.0, 1.0, 1.0, True)\n"
    "print(sum(kernel.stats.cache_hits.values()), state[0].tobytes().hex())\n"
)


@pytest.fixture
def copy_of_kernels(tmp_path: Path) -> Path:
    """The kernels alone in a folder of their own, importable from there without torch."""
    folder = tmp_path / "offload" / "kernels"
    folder.mkdir(parents=True)
    for path in KERNELS.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def run(code: str, folder: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**inherited, "PYTHONPATH": str(folder.parents[1]), **environment},
        capture_output=True, text=True, check=False, cwd=folder.parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_run_takes_its_kernel_from_the_cache_until_any_source_changes(copy_of_kernels: Path) -> None:
    first, second = (run(STEP, copy_of_kernels).split() for _ in range(2))
    assert [first[0], second[0]] == ["0", "1"]
    assert first[1] == second[1]
    # Another file than the kernel's, which numba does not watch.
    lanes = copy_of_kernels / "lanes.py"
    lanes.write_text(lanes.read_text().replace('"fsub"', '"fadd"'))
    third = run(STEP, copy_of_kernels).split()
    assert third[0] == "0"
    assert third[1] != first[1]


def test_kernels_work_where_no_folder_for_the_cache_is_writable(copy_of_kernels: Path) -> None:
    # Files where folders would have to be made: stops even root, who may write anywhere.
    (copy_of_kernels / "__pycache__").write_text("")
    blocked = copy_of_kernels / "blocked"
    blocked.write_text("")
    places = {"HOME": str(blocked), "XDG_CACHE_HOME": str(blocked), "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(2):
        assert run(STEP, copy_of_kernels, **places).split()[0] == "0"


def test_cpus_without_half_instructions_convert_all_65536_patterns(copy_of_kernels: Path) -> None:
    code = (
        "import numpy as np\n"
        "from offload.kernels import cast\n"
        "halves = np.arange(65536, dtype=np.uint32).astype(np.uint16)\n"
        "wide, back = np.zeros(65536, np.float32), np.zeros(65536, np.uint16)\n"
        "cast.cast_kernel('fp16', 'fp32')(halves, wide)\n"
        "expected = halves.view(np.float16).astype(np.float32)\n"
        "assert np.array_equal(wide, expected, equal_nan=True)\n"
        "assert np.array_equal(np.signbit(wide), np.signbit(expected))\n"
        "near = (expected.view(np.uint32)[:, None] + np.array([0, 1, 0xFFF, 0x1000, 0x1001], np.uint32)).ravel()\n"
        "more = np.arange(0x33000000 - 99, 0x38800000, 1021, dtype=np.uint32)\n"
        "floats = np.concatenate([near, more]).view(np.float32)\n"
        "back = np.zeros(floats.size, np.uint16)\n"
        "cast.cast_kernel('fp32', 'fp16')(floats, back)\n"
        "with np.errstate(all='ignore'):\n"
        "    rounded = floats.astype(np.float16)\n"
        "assert np.array_equal(back.view(np.float16), rounded, equal_nan=True)\n"
        "assert np.array_equal(np.signbit(back.view(np.float16)), np.signbit(rounded))\n"
    )
    run(code, copy_of_kernels, NUMBA_CPU_NAME="generic")


def test_importing_compiles_nothing(copy_of_kernels: Path) -> None:
    code = (
        "import numba.core.compiler as compiler\n"
        "def fail(*arguments, **options): raise SystemExit('compiled at import')\n"
        "compiler.compile_extra = fail\n"
        "from offload.kernels import adam, cast, jit, lanes, master_copy, reduce, reference, workers\n"
    )
    run(code, copy_of_kernels)
