"""How kernels are compiled: the cache on disk, and machines without a place for it or without instructions."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.kernels import another_cpu
from tests.kernels.values import assert_same_bits

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
    simd = copy_of_kernels / "simd.py"
    simd.write_text(simd.read_text().replace('"fsub"', '"fadd"'))
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


def test_where_numba_must_not_compile_the_error_says_what_to_do(copy_of_kernels: Path) -> None:
    code = STEP.replace("kernel =", "try:\n    kernel =").partition("state =")[0]
    code += "except RuntimeError as error:\n    print(error)\n"
    assert "NUMBA_DISABLE_JIT is set" in run(code, copy_of_kernels, NUMBA_DISABLE_JIT="1")


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


@pytest.mark.parametrize("damage", [b"", b"\0" * 4096, b"\x80\x04garbage"], ids=["empty", "zeros", "garbage"])
def test_damaged_entries_of_the_cache_do_not_stop_a_session(copy_of_kernels: Path, damage: bytes) -> None:
    run(STEP, copy_of_kernels)
    entries = list((copy_of_kernels / "__pycache__").glob("adam*.nb[ci]"))
    assert len(entries) == 2
    for entry in entries:
        entry.write_bytes(damage)
    assert run(STEP, copy_of_kernels).split()[0] == "0"


HASWELL = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.1,+sse4.2,+ssse3,+xsave"
NEHALEM = "+cx16,+popcnt,+sse4.1,+sse4.2,+ssse3"


def results_on(name: str, features: str, tmp_path: Path) -> dict[str, np.ndarray]:
    """What the kernels leave that are compiled for this CPU."""
    output = tmp_path / f"{name}.npz"
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.another_cpu", str(output)], env={**inherited, **environment},
        capture_output=True, text=True, check=False, cwd=KERNELS.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        return dict(arrays)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 CPUs")
def test_cpus_with_fused_multiply_add_leave_the_same_bits_whatever_their_vectors(tmp_path: Path) -> None:
    ours = another_cpu.everything()
    for name, theirs in results_on("haswell", HASWELL, tmp_path).items():
        assert_same_bits(ours[name], theirs)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 CPUs")
@pytest.mark.parametrize(("name", "features"), [("generic", ""), ("nehalem", NEHALEM)])
def test_cpus_without_fused_multiply_add_differ_in_the_last_bits_of_steps_alone(
    name: str, features: str, tmp_path: Path
) -> None:
    ours = another_cpu.everything()
    for key, theirs in results_on(name, features, tmp_path).items():
        if key.startswith("exact"):
            assert_same_bits(ours[key], theirs)
        elif theirs.dtype == np.float32:
            # A product that is rounded before it is added to one that nearly cancels it.
            np.testing.assert_allclose(ours[key], theirs, rtol=2**-18, atol=2**-20)
        elif theirs.dtype == np.uint8:
            assert np.abs(ours[key].astype(int) - theirs.astype(int)).max() <= 1
        else:
            neighbours = np.abs(ours[key].view(np.int16).astype(int) - theirs.view(np.int16).astype(int)) <= 1
            assert neighbours.all()


def test_many_processes_that_start_at_once_share_one_empty_cache(copy_of_kernels: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "PYTHON"))}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", STEP], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=copy_of_kernels.parents[1],
        )
        for _ in range(4)
    ]  # fmt: skip
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * 4, ended
    assert len({output.split()[1] for output, _ in ended}) == 1
    assert run(STEP, copy_of_kernels).split()[0] == "1"


def test_importing_the_library_compiles_nothing_and_loads_no_compiler_of_torch() -> None:
    code = (
        "import sys, torch, numba\n"
        "import numba.core.compiler as compiler\n"
        "def fail(*arguments, **options): raise SystemExit('compiled at import')\n"
        "compiler.compile_extra = fail\n"
        "before = set(sys.modules)\n"
        "import offload\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'transformers', 'peft', 'accelerate', 'lightning', 'rich', 'pandas', 'scipy', 'triton'}\n"
        "compilers = [name for name in ('torch._dynamo', 'torch._inductor') if name in set(sys.modules) - before]\n"
        "assert not new & heavy and not compilers, (new & heavy, compilers)\n"
    )
    run(code, KERNELS.parent / "offload" / "kernels")


def test_importing_compiles_nothing(copy_of_kernels: Path) -> None:
    code = (
        "import numba.core.compiler as compiler\n"
        "def fail(*arguments, **options): raise SystemExit('compiled at import')\n"
        "compiler.compile_extra = fail\n"
        "from offload.kernels import adagrad, adam, cast, dynamic_map, jit, lion, master_copy, moments\n"
        "from offload.kernels import reduce, sgd, simd, split, step, stochastic, workers\n"
    )
    run(code, copy_of_kernels)
