"""The ordinary loop: what each line of it does in torch, it does inside `offload.enable`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.errors import PlaceholderGradientError, SessionClosedError
from tests.training.models import GPT, gpt, tokens
from tests.training.oracle import EPS, LR, Oracle, adamw, assert_close, assert_same_bits, enable, run_steps, weights_of

Loop = Callable[[nn.Module, Any], None]


def assert_loop_does_what_it_does_in_memory(loop: Loop, home: str, folder: Path, **build: Any) -> None:
    """Run `loop(model, optimizer)` in memory with our kernel and in a session: equal bits."""
    expected, model = gpt(**build), gpt(**build)
    loop(expected, Oracle(adamw(expected)))
    optimizer = adamw(model)
    with enable(model, optimizer, home, folder):
        loop(model, optimizer)
    assert_same_bits(weights_of(model), weights_of(expected))


# ---------------------------------------------------------------------------------------------- zero_grad


def test_zero_grad_before_backward_and_after_step_are_the_same(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(3):
            optimizer.zero_grad()
            model(tokens(seed)).backward()
            optimizer.step()

    assert_loop_does_what_it_does_in_memory(loop, "host", tmp_path)


@pytest.mark.parametrize("home", ["host", "disk"])
def test_gradients_that_are_never_zeroed_add_up_over_steps(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(3):
            model(tokens(seed)).backward()
            optimizer.step()

    assert_loop_does_what_it_does_in_memory(loop, home, tmp_path)


@pytest.mark.parametrize("home", ["host", "disk"])
def test_zero_grad_after_backward_drops_the_gradient_and_the_step_does_nothing(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(3):
            model(tokens(seed)).backward()
            if seed == 1:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()

    assert_loop_does_what_it_does_in_memory(loop, home, tmp_path)


def zero_in_place(optimizer: Any) -> None:
    """As zero_grad(set_to_none=False)."""
    if isinstance(optimizer, torch.optim.Optimizer):
        optimizer.zero_grad(set_to_none=False)
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.zero_()


@pytest.mark.parametrize("home", ["host", "disk"])
def test_gradients_zeroed_in_place_are_zeros_and_decay_still_applies(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(3):
            model(tokens(seed)).backward()
            if seed == 1:
                zero_in_place(optimizer)
            optimizer.step()
            zero_in_place(optimizer)

    assert_loop_does_what_it_does_in_memory(loop, home, tmp_path)


def test_one_gradient_set_to_none_by_hand_is_not_stepped(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        assert isinstance(model, GPT)
        for seed in range(2):
            model(tokens(seed)).backward()
            model.blocks[1].qkv.weight.grad = None
            optimizer.step()
            optimizer.zero_grad()

    assert_loop_does_what_it_does_in_memory(loop, "disk", tmp_path)


@pytest.mark.parametrize("home", ["host", "disk"])
def test_three_micro_batches_add_up_as_in_torch(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for step in range(2):
            for micro in range(3):
                (model(tokens(3 * step + micro)) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_loop_does_what_it_does_in_memory(loop, home, tmp_path)


# ------------------------------------------------------------------------------------- the optimizer's face


def test_the_sessions_optimizer_is_the_users(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    with enable(model, optimizer, "host", tmp_path) as session:
        assert session.optimizer is optimizer


@pytest.mark.parametrize("keyword", [False, True])
def test_step_evaluates_a_closure_once_and_returns_its_loss(keyword: bool, tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    expected_losses = run_steps(expected, Oracle(adamw(expected)), [{"tokens": tokens(s)} for s in range(2)])
    optimizer = adamw(model)
    calls = 0
    with enable(model, optimizer, "host", tmp_path):
        for seed in range(2):

            def closure(seed: int = seed) -> Tensor:
                nonlocal calls
                calls += 1
                optimizer.zero_grad()
                loss = model(tokens(seed))
                loss.backward()
                return loss

            with torch.no_grad():
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert loss.item() == expected_losses[seed]
    assert calls == 2
    assert_same_bits(weights_of(model), weights_of(expected))


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.filterwarnings("error::UserWarning:torch")
def test_a_scheduler_made_before_or_after_enable_sets_the_learning_rate(made: str, tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    optimizer, in_torch = adamw(model), adamw(expected)
    schedules = [torch.optim.lr_scheduler.StepLR(in_torch, 1, 0.5)]
    for seed in range(3):
        expected(tokens(seed)).backward()
        in_torch.step()
        in_torch.zero_grad()
        schedules[0].step()
    if made == "before":
        schedules.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    with enable(model, optimizer, "host", tmp_path):
        if made == "after":
            schedules.append(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
        for seed in range(3):
            model(tokens(seed)).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedules[1].step()
    assert optimizer.param_groups[0]["lr"] == in_torch.param_groups[0]["lr"] == LR / 8
    assert_close(weights_of(model), weights_of(expected), atol=1e-6)


def test_a_learning_rate_set_right_after_step_is_not_that_steps(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        for seed in range(3):
            model(tokens(seed)).backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * group["lr"]
            optimizer.zero_grad()

    assert_loop_does_what_it_does_in_memory(loop, "disk", tmp_path)


def test_groups_have_their_own_rate_and_decay(tmp_path: Path) -> None:
    def grouped(model: nn.Module) -> torch.optim.AdamW:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": vectors, "lr": 3e-3, "weight_decay": 0.0}, {"params": matrices, "betas": (0.8, 0.9)}]
        return torch.optim.AdamW(groups, lr=LR, weight_decay=0.2)

    expected, model = gpt(), gpt()
    batches = [{"tokens": tokens(seed)} for seed in range(3)]
    run_steps(expected, Oracle(grouped(expected)), batches)
    optimizer = grouped(model)
    with enable(model, optimizer, "disk", tmp_path):
        run_steps(model, optimizer, batches)
    assert_same_bits(weights_of(model), weights_of(expected))


# --------------------------------------------------------------------------------------------------- clipping


def test_clipping_a_placeholder_raises_and_names_the_remedy(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    with enable(model, optimizer, "host", tmp_path):
        model(tokens(0)).backward()
        with pytest.raises(PlaceholderGradientError, match="max_grad_norm="):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # the gradients are still there
    assert not torch.equal(model.head.weight, gpt().head.weight)


@pytest.mark.parametrize("home", ["host", "disk"])
def test_max_grad_norm_clips_as_torch_does(home: str, tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    in_torch, optimizer = adamw(expected), adamw(model)
    with enable(model, optimizer, home, tmp_path, max_grad_norm=0.5) as session:
        for seed in range(3):
            expected(tokens(seed)).backward()
            norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            assert norm > 0.5
            in_torch.step()
            in_torch.zero_grad()
            model(tokens(seed)).backward()
            assert session.step().grad_norm == pytest.approx(norm.item(), rel=1e-6)
            optimizer.zero_grad()
    assert_close(weights_of(model), weights_of(expected), atol=1e-6)


# ------------------------------------------------------------------------- frozen, missing, unused and tied ones


def test_frozen_parameters_keep_their_bits_and_the_others_train(tmp_path: Path) -> None:
    def freeze(model: GPT) -> GPT:
        model.embedding.weight.requires_grad_(False)
        for p in model.blocks[1].parameters():
            p.requires_grad_(False)
        model.blocks[2].qkv.weight.requires_grad_(False)
        return model

    expected, model = freeze(gpt()), freeze(gpt())
    batches = [{"tokens": tokens(seed)} for seed in range(3)]
    run_steps(expected, Oracle(adamw(expected)), batches)
    optimizer = adamw(model)
    with enable(model, optimizer, "disk", tmp_path):
        run_steps(model, optimizer, batches)
    assert_same_bits(weights_of(model), weights_of(expected))
    assert torch.equal(model.embedding.weight, gpt().embedding.weight)


def test_parameters_missing_from_the_optimizer_stay_as_they_are(tmp_path: Path) -> None:
    def partial_optimizer(model: GPT) -> torch.optim.AdamW:
        return torch.optim.AdamW([*model.blocks.parameters(), model.embedding.weight], lr=LR)

    expected, model = gpt(), gpt()
    batches = [{"tokens": tokens(seed)} for seed in range(2)]
    run_steps(expected, Oracle(partial_optimizer(expected)), batches)
    optimizer = partial_optimizer(model)
    with enable(model, optimizer, "disk", tmp_path):
        run_steps(model, optimizer, batches)
        assert model.head.weight.grad is None
    assert_same_bits(weights_of(model), weights_of(expected))
    assert torch.equal(model.head.weight, gpt().head.weight)


@pytest.mark.parametrize("home", ["host", "disk"])
def test_a_skipped_block_keeps_its_weights_and_its_step_count(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        assert isinstance(model, GPT)
        for seed in range(4):
            model.skip = {1} if seed % 2 == 0 else {2}
            model(tokens(seed)).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert_loop_does_what_it_does_in_memory(loop, home, tmp_path)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_tied_weights_are_one_parameter(home: str, tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Any) -> None:
        run_steps(model, optimizer, [{"tokens": tokens(seed)} for seed in range(3)])

    assert_loop_does_what_it_does_in_memory(loop, home, tmp_path, tied=True)


# ------------------------------------------------------------------------------------------ reading and leaving


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_state_dict_inside_holds_the_trained_values(home: str, tmp_path: Path) -> None:
    model = gpt(tied=True)
    optimizer = adamw(model)
    with enable(model, optimizer, home, tmp_path):
        run_steps(model, optimizer, [{"tokens": tokens(0)}])
        inside = model.state_dict()
        run_steps(model, optimizer, [{"tokens": tokens(1)}])
        later = model.state_dict()
    assert not torch.equal(inside["head.weight"], later["head.weight"])  # a copy: training on does not change it
    assert_same_bits(later, {name: value.detach() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_leaving_gives_parameters_back_in_their_dtype_and_on_their_device(dtype: torch.dtype, tmp_path: Path) -> None:
    model = gpt().to(dtype)
    parameters = list(model.parameters())
    before = weights_of(model)
    optimizer = adamw(model)
    with enable(model, optimizer, "disk", tmp_path):
        pass
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {(p.dtype, p.device.type, p.grad) for p in parameters} == {(dtype, "cpu", None)}
    assert_same_bits(weights_of(model), before)


def test_leaving_gives_the_moments_to_the_optimizer_and_torch_trains_on(tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    in_torch, optimizer = adamw(expected), adamw(model)
    batches = [{"tokens": tokens(seed)} for seed in range(3)]
    run_steps(expected, in_torch, batches)
    with enable(model, optimizer, "disk", tmp_path):
        run_steps(model, optimizer, batches)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        found, wanted = optimizer.state[p], in_torch.state[q]
        assert found["step"].item() == wanted["step"].item() == 3
        torch.testing.assert_close(found["exp_avg"], wanted["exp_avg"], rtol=0, atol=1e-6)
        torch.testing.assert_close(found["exp_avg_sq"], wanted["exp_avg_sq"], rtol=0, atol=1e-6)
    more = [{"tokens": tokens(seed)} for seed in range(3, 5)]
    assert run_steps(model, optimizer, more) == pytest.approx(run_steps(expected, in_torch, more), abs=1e-5)


def test_a_second_session_goes_on_from_the_moments_of_the_first(tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    batches = [{"tokens": tokens(seed)} for seed in range(4)]
    run_steps(expected, Oracle(adamw(expected)), batches)
    optimizer = adamw(model)
    for half in (batches[:2], batches[2:]):
        with enable(model, optimizer, "disk", tmp_path):
            run_steps(model, optimizer, half)
    assert_same_bits(weights_of(model), weights_of(expected))


def test_a_closed_session_says_so_and_the_optimizer_is_torchs_again(tmp_path: Path) -> None:
    model = gpt()
    optimizer = adamw(model)
    session = enable(model, optimizer, "host", tmp_path)
    session.close()
    session.close()
    with pytest.raises(SessionClosedError):
        session.step()
    before = weights_of(model)
    run_steps(model, optimizer, [{"tokens": tokens(0)}])
    assert not torch.equal(model.head.weight, before["head.weight"])


class OfParent(torch.optim.AdamW):
    """Calls the step of its parent, which calls the hooks again where some AdamW was made before."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        return super().step(closure)


def test_a_class_that_calls_the_step_of_its_parent_steps_once(tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    batches = [{"tokens": tokens(seed)} for seed in range(3)]
    run_steps(expected, adamw(expected), batches)
    optimizer = OfParent(model.parameters(), lr=LR, eps=EPS, weight_decay=0.05, foreach=False)
    with enable(model, optimizer, "host", tmp_path):
        run_steps(model, optimizer, batches)
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}
    assert_close(weights_of(model), weights_of(expected), atol=1e-5)


def test_gradients_set_by_hand_before_any_backward_are_stepped(tmp_path: Path) -> None:
    expected, model = gpt(), gpt()
    in_torch, optimizer = adamw(expected), adamw(model)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for p in model.parameters():
            p.grad = torch.full(p.shape, 0.1)
        optimizer.step()
        optimizer.zero_grad()

    step(expected, in_torch)
    with enable(model, optimizer, "host", tmp_path):
        step(model, optimizer)
    assert_close(weights_of(model), weights_of(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_after_leaving_torch_trains_parameters_of_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model = gpt().to(dtype)
    optimizer = adamw(model)
    batches = [{"tokens": tokens(seed)} for seed in range(2)]
    with enable(model, optimizer, "host", tmp_path):
        run_steps(model, optimizer, batches[:1])
    run_steps(model, optimizer, batches[1:])
    assert all(state["exp_avg"].dtype is dtype for state in optimizer.state.values())
