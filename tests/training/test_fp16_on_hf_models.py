"""fp16 on real models: the same losses, weights and skipped steps on every home, with overflows on chosen steps."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from offload.optimizer.loss_scale import INITIAL_SCALE
from offload.units import Tier
from tests.training.models import HF_MODELS, hf_batch, seeded
from tests.training.oracle import HOMES, adamw, assert_close, assert_same_bits, enable, weights_of

NUM_STEPS = 6


class Run(NamedTuple):
    losses: list[float]
    results: list[tuple[bool, float, float]]
    """Skipped, loss scale and norm of every step; the norm of a skipped one as 0."""
    digest: str
    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    num_skipped: int


def run(name: str, home: str, folder: Path, overflow_at: dict[int, float], **options: object) -> Run:
    """Train `name` at home `home`; the loss of the steps `overflow_at` is multiplied by what stands there."""
    model = seeded(HF_MODELS[name])
    optimizer = adamw(model)
    losses, results = [], []
    with enable(model, optimizer, home, folder, precision="fp16", max_grad_norm=1.0, **options) as session:
        for step in range(NUM_STEPS):
            loss = model(**hf_batch(name, step)).loss.float()
            session.backward(loss * overflow_at.get(step, 1.0))
            result = session.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            results.append((result.skipped, result.loss_scale, 0.0 if result.skipped else result.grad_norm))
        digest = session.weights_sha256()
        assert session.plan.bytes_by_kind_and_tier["state"][Tier(home)] > 0
        skipped = session.timeline.counter("skipped steps")
    moments = {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters() if p in optimizer.state}
    return Run(losses, results, digest, weights_of(model), moments, skipped)


OVERFLOWS = {
    "none": {},
    "first": {0: float("inf")},
    "middle": {2: float("inf"), 3: float("nan")},
    "by size": {1: 1e30, 4: -1e30},  # finite in fp32; beyond fp16 in the gradients
}


@pytest.mark.parametrize("name", HF_MODELS)
def test_every_home_skips_the_same_steps_and_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    overflow_at = OVERFLOWS["middle"] | OVERFLOWS["by size"]
    runs = [run(name, home, tmp_path, overflow_at) for home in HOMES]
    skipped = [step for step, (was_skipped, _, _) in enumerate(runs[0].results) if was_skipped]
    assert set(skipped) >= set(overflow_at), runs[0].results
    for one in runs[1:]:
        assert one.losses == runs[0].losses
        assert one.results == runs[0].results
        assert one.digest == runs[0].digest
        assert_same_bits(one.weights, runs[0].weights)
        assert_same_bits(one.moments, runs[0].moments)
    assert [one.num_skipped for one in runs] == [len(skipped)] * 3


@pytest.mark.parametrize("case", OVERFLOWS)
def test_the_scale_halves_at_every_overflow_and_at_no_other_step(case: str, tmp_path: Path) -> None:
    found = run("llama", "disk", tmp_path, OVERFLOWS[case])
    scale = INITIAL_SCALE
    for step, (skipped, loss_scale, norm) in enumerate(found.results):
        assert (skipped, loss_scale) == (step in OVERFLOWS[case], scale)
        assert (norm > 0.0) == (not skipped)
        scale /= 2.0 if skipped else 1.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_run_with_overflows_is_the_run_without_those_steps(name: str, tmp_path: Path) -> None:
    """A skipped step leaves nothing behind: neither decay, nor moments, nor a step count."""
    overflow_at = {1: float("inf"), 4: float("nan")}
    with_overflows = run(name, "disk", tmp_path, overflow_at)
    model = seeded(HF_MODELS[name])
    optimizer = adamw(model)
    losses = []
    with enable(model, optimizer, "device", tmp_path, precision="fp16", max_grad_norm=1.0) as session:
        for step in range(NUM_STEPS):
            loss = model(**hf_batch(name, step)).loss.float()
            losses.append(loss.item())
            if step in overflow_at:
                session._components.step_history._loss_scale.update(skipped=True)
                continue
            session.backward(loss)
            assert not session.step().skipped
            optimizer.zero_grad()
    assert losses == with_overflows.losses
    assert_same_bits(weights_of(model), with_overflows.weights)
    steps = {int(optimizer.state[p]["step"]) for p in model.parameters() if p in optimizer.state}
    assert steps == {NUM_STEPS - len(overflow_at)}


def test_accumulating_over_micro_batches_skips_where_one_of_them_overflows(tmp_path: Path) -> None:
    def once(home: str) -> tuple[str, list[bool]]:
        model = seeded(HF_MODELS["llama"])
        optimizer = adamw(model)
        skipped = []
        with enable(model, optimizer, home, tmp_path, precision="fp16", accumulate=3) as session:
            for step in range(3):
                for micro in range(3):
                    loss = model(**hf_batch("llama", 3 * step + micro)).loss.float() / 3
                    session.backward(loss * (float("inf") if (step, micro) == (1, 1) else 1.0))
                skipped.append(session.step().skipped)
                optimizer.zero_grad()
            return session.weights_sha256(), skipped

    runs = [once(home) for home in HOMES]
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][1] == [False, True, False]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_fp16_stays_close_to_fp32(name: str, tmp_path: Path) -> None:
    in_fp16 = run(name, "disk", tmp_path, {})
    assert in_fp16.num_skipped == 0
    expected = seeded(HF_MODELS[name])
    optimizer = adamw(expected)
    for step in range(NUM_STEPS):
        loss = expected(**hf_batch(name, step)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert in_fp16.losses[step] == pytest.approx(loss.item(), abs=0.02)
    # Every step moves an element by about lr (1e-3) at most: where a gradient is near 0, fp16 may turn its sign.
    assert_close(in_fp16.weights, weights_of(expected), atol=2e-3 * NUM_STEPS)
