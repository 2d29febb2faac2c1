"""Sums of squares, landing and the threads that run kernels."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from offload.kernels import reduce, reference
from offload.kernels.workers import CHUNK_NUMEL, Workers


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:  # type: ignore[type-arg]
    return reference.round_weights(values, dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("numel", [1, 7, 16, 33, 4097, 65_536])
def test_sums_of_squares_are_those_of_fp64(dtype: str, numel: int) -> None:
    values = as_dtype(np.random.default_rng(numel).standard_normal(numel).astype(np.float32), dtype)
    out = np.zeros(1)
    reduce.square_sums_kernel(dtype)(values, np.array([0]), np.array([numel]), out)
    expected = (reference.load(values, dtype).astype(np.float64) ** 2).sum()
    assert out[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 5, 64, 99])
def test_one_bad_element_makes_its_sum_not_finite_and_no_other(bad: float, position: int) -> None:
    values = np.ones(200, np.float32)
    values[position] = bad
    out = np.zeros(2)
    reduce.square_sums_kernel("fp32")(values, np.array([0, 100]), np.array([100, 200]), out)
    assert not math.isfinite(out[0])
    assert out[1] == 100.0


def test_the_largest_values_do_not_overflow_a_sum() -> None:
    values = np.full(65_536, np.finfo(np.float32).max, np.float32)
    out = np.zeros(1)
    reduce.square_sums_kernel("fp32")(values, np.array([0]), np.array([65_536]), out)
    assert math.isfinite(out[0])


@pytest.mark.parametrize(("source", "home"), [("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("add", [False, True])
def test_landing_writes_its_segments_alone(source: str, home: str, add: bool) -> None:
    rng = np.random.default_rng(1)
    came = as_dtype(rng.standard_normal(300).astype(np.float32), source)
    held = as_dtype(rng.standard_normal(300).astype(np.float32), home)
    before, out = held.copy(), np.zeros(2)
    reduce.land_kernel(source, home, add)(came, held, np.array([10, 200]), np.array([77, 290]), out)
    inside = np.r_[10:77, 200:290]
    outside = np.setdiff1d(np.arange(300), inside)
    np.testing.assert_array_equal(held[outside], before[outside])
    kept = reference.load(held, home)
    exact = reference.load(came, source) + (reference.load(before, home) if add else np.float32(0))
    tolerance = 2.0**-8 if home == "bf16" else 0.0
    np.testing.assert_allclose(kept[inside], exact[inside], rtol=tolerance)
    assert out[0] == pytest.approx((kept[10:77].astype(np.float64) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_workers_cut_at_the_same_borders_whatever_their_number(num_threads: int) -> None:
    seen = []
    with Workers(num_threads) as workers:
        workers.run(lambda a, b: seen.append((a, b)), 100, 2 * CHUNK_NUMEL + 5)
    assert sorted(seen) == [(100, CHUNK_NUMEL), (CHUNK_NUMEL, 2 * CHUNK_NUMEL), (2 * CHUNK_NUMEL, 2 * CHUNK_NUMEL + 5)]


def test_an_error_in_one_chunk_is_raised_after_all_have_ended() -> None:
    ended = []

    def work(a: int, b: int) -> None:
        ended.append(a)
        if a == 0:
            raise ValueError("chunk 0")

    with Workers(2) as workers, pytest.raises(ValueError, match="chunk 0"):
        workers.run(work, 0, 3 * CHUNK_NUMEL)
    assert len(ended) == 3


def test_kernels_work_where_no_cache_folder_is_writable(tmp_path: Path) -> None:
    code = (
        "import numba.core.caching as c\n"
        "def none(*a, **k): raise RuntimeError('cannot cache function: no locator available')\n"
        "c.FunctionCache.__init__ = none\n"
        "from offload.kernels import adam; adam.step_kernel('fp32', 'fp32'); print('works')\n"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        check=True, cwd=tmp_path,
    )  # fmt: skip
    assert run.stdout.strip() == "works"
