"""How many instructions kernels need, by the CPUs they are compiled for: the machine that runs this may be another."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

AVX2 = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.1,+sse4.2,+ssse3,+xsave"
AVX512 = AVX2 + ",+avx512bw,+avx512cd,+avx512dq,+avx512f,+avx512vl"

# What was counted when this was written, and a twentieth: another version of LLVM may order and spill otherwise.
LIMITS = {
    ("haswell", AVX2): {
        "fused": 65, "fused, fp16": 44, "fused, split master": 77, "bf16 moments": 130, "8-bit moments": 267,
        "lion": 57, "8-bit to fp32": 33, "fp32 to bf16": 24,
    },
    ("skylake-avx512", AVX512): {
        "fused": 30, "fused, fp16": 25, "fused, split master": 34, "bf16 moments": 60, "8-bit moments": 121,
        "lion": 27, "8-bit to fp32": 17, "fp32 to bf16": 12,
    },
}  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86 CPUs")
@pytest.mark.parametrize("cpu", LIMITS, ids=[name for name, _ in LIMITS])
def test_sixteen_elements_take_no_more_instructions_than(cpu: tuple[str, str], tmp_path: Path) -> None:
    name, features = cpu
    environment = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.instruction_counts"], env={**inherited, **environment},
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)
    assert {key: count for key, count in counted.items() if count > LIMITS[cpu][key]} == {}
    assert counted.keys() == LIMITS[cpu].keys()
