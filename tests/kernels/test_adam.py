"""The step kernel against its oracle, against torch, and against itself cut differently."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload.kernels import adam, master_copy, reference
from offload.units import BLOCK_NUMEL

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
KINDS = [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")]
SIZES = [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 4097, BLOCK_NUMEL - 1, BLOCK_NUMEL, BLOCK_NUMEL + 1]


def make_state(numel: int, kind: tuple[str, str], seed: int = 0) -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    master = rng.standard_normal(numel).astype(np.float32)
    exp_avg = rng.standard_normal(numel).astype(np.float32)
    exp_avg_sq = rng.random(numel).astype(np.float32)
    gradient = rng.standard_normal(numel).astype(np.float32)
    if kind[0] == "bf16":
        gradient = (gradient.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return [master, exp_avg, exp_avg_sq, gradient, np.zeros(numel, np.float32 if kind[1] == "fp32" else np.uint16)]


def arguments(step: int, *, decoupled: bool, scale: float = 0.5) -> tuple[Any, ...]:
    corrections = (1 - HYPER["beta1"] ** step, math.sqrt(1 - HYPER["beta2"] ** step))
    return (*HYPER.values(), *corrections, scale, decoupled)


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", SIZES)
def test_the_step_matches_the_oracle(numel: int, kind: tuple[str, str], decoupled: bool) -> None:
    ours, oracle = make_state(numel, kind), make_state(numel, kind)
    for step in (1, 2, 3):
        adam.step_kernel(*kind)(*ours, 0, *arguments(step, decoupled=decoupled))
        reference.step(*oracle, 0, *arguments(step, decoupled=decoupled), dtypes=kind)
    for mine, theirs in zip(ours[:3], oracle[:3], strict=True):
        np.testing.assert_array_max_ulp(mine, theirs, maxulp=2)
    np.testing.assert_array_equal(ours[4], reference.round_weights(ours[0], kind[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_how_blocks_are_cut(kind: tuple[str, str]) -> None:
    numel = 5 * BLOCK_NUMEL + 13
    whole, cut = make_state(numel, kind), make_state(numel, kind)
    kernel = adam.step_kernel(*kind)
    kernel(*whole, 0, *arguments(1, decoupled=True))
    for start, stop in ((0, BLOCK_NUMEL), (BLOCK_NUMEL, 4 * BLOCK_NUMEL), (4 * BLOCK_NUMEL, numel)):
        kernel(*(array[start:stop] for array in cut), start, *arguments(1, decoupled=True))
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_array_equal(a, b)


def test_vector_body_and_tail_round_alike() -> None:
    state = make_state(64, ("fp32", "bf16"))
    kernel = adam.step_kernel("fp32", "bf16")
    whole = [array.copy() for array in state]
    kernel(*whole, 0, *arguments(1, decoupled=True))
    for i in range(64):  # alone, every element is a tail
        one = [array[i : i + 1].copy() for array in state]
        kernel(*one, 0, *arguments(1, decoupled=True))
        assert [a[0] for a in one] == [a[i] for a in whole]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_five_steps_agree_with_torch(cls: type[torch.optim.Optimizer]) -> None:
    parameter = torch.nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(3)))
    ours = [parameter.detach().numpy().copy(), *(np.zeros(1000, np.float32) for _ in range(2))]
    optimizer = cls([parameter], lr=HYPER["lr"], betas=(0.9, 0.99), weight_decay=0.1)
    rng = np.random.default_rng(4)
    for step in range(1, 6):
        gradient = rng.standard_normal(1000).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        decoupled = cls is torch.optim.AdamW
        out = np.zeros(1000, np.float32)
        adam.step_kernel("fp32", "fp32")(*ours, gradient, out, 0, *arguments(step, decoupled=decoupled, scale=1.0))
    np.testing.assert_allclose(ours[0], parameter.detach().numpy(), rtol=2e-6, atol=1e-7)


def test_special_values_pass_as_ieee_says() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 3e38], np.float32)
    out = np.zeros(len(values), np.uint16)
    master_copy.copy_weights(values, out, "bf16")
    np.testing.assert_array_equal(out, reference.round_weights(values, "bf16"))
    master_copy.copy_weights(values, out, "fp16")
    np.testing.assert_array_equal(out, reference.round_weights(values, "fp16") | (np.isnan(values) * out))


def test_the_hot_loop_is_vectorised_in_every_variant(tmp_path: Path) -> None:
    # A kernel from the cache has no assembly to look at: compile anew, in a process with a cache of its own.
    code = (
        "from offload.kernels import adam\n"
        f"for kind in {KINDS!r}:\n"
        "    print('KERNEL', *adam.step_kernel(*kind).inspect_asm().values())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    kernels = run.stdout.split("KERNEL")[1:]
    assert len(kernels) == len(KINDS)
    for assembly in kernels:
        assert re.search(r"vsqrtps.*[yz]mm|fsqrt\s+v\d+\.4s", assembly)
        assert re.search(r"vdivps.*[yz]mm|fdiv\s+v\d+\.4s", assembly)
