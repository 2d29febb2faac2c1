"""Weights are used outside their modules, read, written and differentiated, as plain torch allows.

Every case is one script; it has to see the values and end at the weights that it does without a session.
"""

import copy
import io
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import offload
from offload.errors import ParameterWritten
from tests.scripts.script import Case, Script, check, outcome
from tests.training.models import gpt, tokens
from tests.training.oracle import enable

READS: Final[dict[str, Case]] = {}
WRITES: Final[dict[str, Case]] = {}
LOSSES: Final[dict[str, Case]] = {}


def read(case: Case) -> Case:
    READS[case.__name__] = case
    return case


def write(case: Case) -> Case:
    WRITES[case.__name__] = case
    return case


def in_loss(case: Case) -> Case:
    LOSSES[case.__name__] = case
    return case


def between_steps(look) -> Case:
    """Look before, between and after two steps."""

    def case(s: Script) -> None:
        look(s)
        s.steps()
        look(s)
        s.steps()
        look(s)

    return case


# ------------------------------------------------------------------------------------------------------- reads

LOOKS = {
    "norm": lambda s: [s.see(p.norm()) for p in s.model.parameters()],
    "detach": lambda s: [s.see(p.detach()) for p in s.model.parameters()],
    "data": lambda s: [s.see(p.data) for p in s.model.parameters()],
    "clone": lambda s: [s.see(p.clone()) for p in s.model.parameters()],
    "cpu": lambda s: [s.see(p.to("cpu")) for p in s.model.parameters()],
    "float64": lambda s: [s.see(p.double()) for p in s.model.parameters()],
    "numpy": lambda s: [s.see(p.detach().numpy().copy()) for p in s.model.parameters()],
    "asarray": lambda s: s.see(np.asarray(s.model.head.weight.detach()).copy()),
    "tolist": lambda s: s.see(s.model.norm.weight.tolist()),
    "item": lambda s: s.see(s.model.head.weight.sum().item()),
    "histogram": lambda s: s.see(torch.histc(s.model.head.weight.detach(), 8)),
    "dtype": lambda s: s.see(s.model.head.weight.dtype is torch.float32),
    "transpose": lambda s: s.see(s.model.head.weight.T),
    "rows": lambda s: s.see(s.model.embedding.weight[3], s.model.embedding.weight[[1, 5]]),
    "iterate": lambda s: s.see(sum(row.sum() for row in s.model.norm.weight)),
    "unbind": lambda s: s.see(*s.model.blocks[0].norm1.weight.unbind()[:3]),
    "foreach_norm": lambda s: s.see(*torch._foreach_norm(list(s.model.parameters()))),
    "stack": lambda s: s.see(torch.stack([b.norm1.weight for b in s.model.blocks])),
    "cat": lambda s: s.see(torch.cat([p.flatten() for p in s.model.parameters()])),
    "vector": lambda s: s.see(nn.utils.parameters_to_vector(s.model.parameters())),
    "linear": lambda s: s.see(F.linear(torch.ones(2, 32), s.model.head.weight)),
    "matmul": lambda s: s.see(torch.ones(2, 32) @ s.model.head.weight.T),
    "einsum": lambda s: s.see(torch.einsum("vh,wh->vw", s.model.head.weight, s.model.embedding.weight)),
    "svd": lambda s: s.see(torch.linalg.svdvals(s.model.blocks[0].out.weight)),
    "compare": lambda s: s.see((s.model.head.weight > 0).sum(), torch.equal(s.model.head.weight, s.model.head.weight)),
    "isfinite": lambda s: s.see(all(bool(p.isfinite().all()) for p in s.model.parameters())),
    "copy_from": lambda s: s.see(torch.zeros(96, 32).copy_(s.model.head.weight.detach())),
    "lerp_from": lambda s: s.see(torch.zeros(96, 32).lerp_(s.model.head.weight.detach(), 0.5)),
    "out": lambda s: s.see(torch.add(s.model.head.weight.detach(), 1, out=torch.empty(96, 32))),
    "deepcopy": lambda s: s.see(copy.deepcopy(s.model.head.weight)),
    "empty_like": lambda s: s.see(torch.zeros_like(s.model.head.weight) + s.model.head.weight.new_ones(1)),
    "repr": lambda s: s.see(len(repr(s.model.norm.weight))),
    "format": lambda s: s.see(float(f"{s.model.head.weight.sum():.3f}")),
    "grads_are_none": lambda s: s.see(all(p.grad is None for p in s.model.parameters())),
    "state_dict": lambda s: s.see(*s.model.state_dict().values()),
    "no_grad_use": lambda s: s.see(torch.no_grad()(lambda: s.model.head(torch.ones(1, 32)))()),
    "evaluation": lambda s: s.see(torch.no_grad()(lambda: s.model(tokens(77)))()),
    "std": lambda s: s.see(*(p.std() for p in s.model.parameters() if p.numel() > 1)),
    "split": lambda s: s.see(*s.model.blocks[1].qkv.weight.chunk(3)),
    "flatten": lambda s: s.see(s.model.head.weight.flatten()[5:9]),
}
for name, look in LOOKS.items():
    READS[name] = between_steps(look)


@read
def pickled(s: Script) -> None:
    s.steps()
    buffer = io.BytesIO()
    torch.save({"head": s.model.head.weight, "data": s.model.norm.weight.data}, buffer)
    buffer.seek(0)
    s.see(*torch.load(buffer).values())


@read
def averaged_model(s: Script) -> None:
    average = AveragedModel(gpt(), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        s.steps()
        average.update_parameters(s.model)
    s.see(*average.module.state_dict().values())


@read
def stochastic_weight_average(s: Script) -> None:
    average = AveragedModel(gpt())
    for _ in range(3):
        s.steps()
        average.update_parameters(s.model)
    s.see(*average.module.state_dict().values())


@read
def ema_by_hand(s: Script) -> None:
    average = [p.detach().clone() for p in s.model.parameters()]
    for _ in range(3):
        s.steps()
        for e, p in zip(average, s.model.parameters(), strict=True):
            e.lerp_(p.detach(), 0.1)
    s.see(*average)


@read
def ema_by_foreach(s: Script) -> None:
    average = [p.detach().clone() for p in s.model.parameters()]
    for _ in range(3):
        s.steps()
        with torch.no_grad():
            torch._foreach_mul_(average, 0.9)
            torch._foreach_add_(average, list(s.model.parameters()), alpha=0.1)
    s.see(*average)


@read
def ema_of_data(s: Script) -> None:
    average = {name: p.data.clone() for name, p in s.model.named_parameters()}
    for _ in range(2):
        s.steps()
        for name, p in s.model.named_parameters():
            average[name] = 0.9 * average[name] + 0.1 * p.data
    s.see(*average.values())


@read
def teacher_that_copies(s: Script) -> None:
    teacher = gpt().requires_grad_(False)
    for _ in range(2):
        s.steps()
        for t, p in zip(teacher.parameters(), s.model.parameters(), strict=True):
            t.data.mul_(0.5).add_(p.data, alpha=0.5)
    s.see(*teacher.parameters())


@read
def load_into_another_model(s: Script) -> None:
    s.steps()
    other = gpt()
    other.load_state_dict(s.model.state_dict())
    s.see(*other.parameters())


# ------------------------------------------------------------------------------------------------------ writes

EDITS = {
    "mul": lambda m: m.head.weight.mul_(0.5),
    "clamp": lambda m: m.head.weight.clamp_(-0.01, 0.01),
    "data_clamp": lambda m: m.head.weight.data.clamp_(-0.01, 0.01),
    "data_mul": lambda m: m.embedding.weight.data.mul_(1.5),
    "copy": lambda m: m.head.weight.copy_(m.embedding.weight),
    "fill_norm": lambda m: m.norm.weight.fill_(0.7),
    "zero_bias": lambda m: m.blocks[0].out.bias.zero_(),
    "set_row": lambda m: m.embedding.weight.__setitem__(3, 0.25),
    "set_mask": lambda m: m.head.weight.__setitem__(m.head.weight > 0.02, 0.02),
    "row_view": lambda m: m.embedding.weight[3].add_(1.0),
    "data_view": lambda m: m.embedding.weight.data[4:6].zero_(),
    "transposed": lambda m: m.blocks[0].out.weight.T.mul_(0.9),
    "detach_view": lambda m: m.blocks[0].out.weight.detach().view(-1)[:5].fill_(0.1),
    "assign_data": lambda m: setattr(m.norm.weight, "data", torch.full((32,), 0.9)),
    "lerp": lambda m: m.head.weight.lerp_(m.embedding.weight, 0.1),
    "addcmul": lambda m: m.head.weight.addcmul_(m.embedding.weight, m.head.weight, value=0.1),
    "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 0.99),
    "foreach_lerp": lambda m: torch._foreach_lerp_([m.head.weight], [m.embedding.weight], 0.2),
    "init_normal": lambda m: nn.init.constant_(m.head.weight, 0.01),
    "init_orthogonal": lambda m: (torch.manual_seed(1), nn.init.orthogonal_(m.blocks[1].out.weight)),
    "init_zeros": lambda m: nn.init.zeros_(m.blocks[1].out.bias),
    "reset": lambda m: (torch.manual_seed(2), m.blocks[2].out.reset_parameters()),
    "out": lambda m: torch.mul(m.head.weight, 0.5, out=m.head.weight.data),
    "vector": lambda m: nn.utils.vector_to_parameters(torch.linspace(-0.1, 0.1, 64), m.norm.parameters()),
    "add_noise": lambda m: (torch.manual_seed(3), [p.add_(torch.randn_like(p) * 1e-3) for p in m.parameters()]),
    "weight_decay_by_hand": lambda m: [p.mul_(0.99) for p in m.parameters() if p.ndim > 1],
    "masked_fill": lambda m: m.head.weight.masked_fill_(m.head.weight.abs() < 0.01, 0.0),
    "index_copy": lambda m: m.embedding.weight.index_copy_(0, torch.tensor([2]), torch.ones(1, 32)),
    "renorm": lambda m: m.head.weight.data.renorm_(2, 0, 0.1),
    "div_by_norm": lambda m: m.head.weight.div_(m.head.weight.norm(dim=1, keepdim=True)),
    "swap_two": lambda m: (lambda a: (m.head.weight.copy_(m.embedding.weight), m.embedding.weight.copy_(a)))(
        m.head.weight.clone()
    ),
    "twice": lambda m: (m.norm.bias.add_(1), m.norm.bias.add_(1)),
}
for name, edit in EDITS.items():

    def edited(s: Script, edit=edit) -> None:
        for _ in range(2):
            s.steps()
            with torch.no_grad():
                edit(s.model)
            s.see(*s.model.parameters())
        s.steps()

    WRITES[name] = edited


class Scaled(nn.Module):
    """As CLIP: a scalar that scripts clamp after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = gpt()
        self.logit_scale = nn.Parameter(torch.tensor(4.59))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.inner(batch) * self.logit_scale.exp().log() * 0.1


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("how", ["clamp", "data", "mul"])
def test_a_scalar_is_clamped_after_each_step(how: str, home: str, tmp_path: Path) -> None:
    def case(s: Script) -> None:
        for _ in range(3):
            s.steps()
            with torch.no_grad():
                if how == "clamp":
                    s.model.logit_scale.clamp_(0, 4.58)
                elif how == "data":
                    s.model.logit_scale.data.clamp_(0, 4.58)
                else:
                    s.model.logit_scale.mul_(0.5)
            s.see(s.model.logit_scale)

    check(case, home, tmp_path, build=Scaled)


# ------------------------------------------------------------------------------------------- uses in the loss

PENALTIES = {
    "l2": lambda m: sum(p.pow(2).sum() for p in m.parameters()) * 1e-3,
    "l1": lambda m: sum(p.abs().sum() for p in m.blocks.parameters()) * 1e-4,
    "norm": lambda m: m.head.weight.norm() * 0.1,
    "l2_of_one": lambda m: (m.embedding.weight**2).mean(),
    "orthogonal": lambda m: (m.blocks[0].out.weight @ m.blocks[0].out.weight.T - torch.eye(32)).square().mean(),
    "tie": lambda m: (m.head.weight - m.embedding.weight).square().mean(),
    "transposed": lambda m: (torch.ones(2, 32) @ m.head.weight.T).square().mean(),
    "linear": lambda m: F.linear(torch.ones(2, 32), m.head.weight).square().mean(),
    "embedding": lambda m: F.embedding(torch.tensor([1, 2, 3]), m.embedding.weight).square().sum() * 0.1,
    "layer_norm": lambda m: F.layer_norm(torch.arange(32.0), (32,), m.norm.weight, m.norm.bias).square().mean(),
    "row": lambda m: m.embedding.weight[5].square().sum(),
    "stacked": lambda m: torch.stack([b.norm1.weight for b in m.blocks]).var(dim=0).sum(),
    "vector": lambda m: nn.utils.parameters_to_vector(m.parameters()).square().mean(),
}
for name, penalty in PENALTIES.items():

    def penalised(s: Script, penalty=penalty) -> None:
        for _ in range(3):
            s.finish(s.loss() + penalty(s.model))

    LOSSES[name] = penalised


@in_loss
def elastic(s: Script) -> None:
    """Towards where training began, weighted, as EWC and L2-SP do."""
    start = [p.detach().clone() for p in s.model.parameters()]
    for _ in range(3):
        distance = sum((p - p0).square().sum() for p, p0 in zip(s.model.parameters(), start, strict=True))
        s.finish(s.loss() + 0.01 * distance)


@in_loss
def penalty_before_the_forward(s: Script) -> None:
    for _ in range(2):
        penalty = s.model.head.weight.square().mean()
        s.finish(penalty + s.loss())


@in_loss
def penalty_alone(s: Script) -> None:
    s.steps()
    s.finish(s.model.head.weight.square().mean() + s.model.norm.bias.sum())
    s.steps()


@in_loss
def gradient_of_a_weight(s: Script) -> None:
    s.steps()
    loss = s.model.head.weight.square().mean()
    (gradient,) = torch.autograd.grad(loss, [s.model.head.weight])
    s.see(gradient)


class Scale(torch.autograd.Function):
    """Saves the parameter that it gets."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, gradient * x


class SaveOnly(torch.autograd.Function):
    """Saves the parameter without using it in forward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient * 2, weight * 0.01


@in_loss
def custom_function(s: Script) -> None:
    for _ in range(2):
        s.finish(s.loss() + Scale.apply(torch.linspace(0, 1, 32), s.model.norm.weight).square().mean())


@in_loss
def custom_function_that_only_saves(s: Script) -> None:
    for _ in range(2):
        x = torch.linspace(0, 1, 32, requires_grad=True)
        s.finish(s.loss() + SaveOnly.apply(x, s.model.norm.weight).square().mean())


class Reader(nn.Module):
    """Uses the weights of modules that it does not call: a fused head, and a tied embedding."""

    def __init__(self, *, tied: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.inner = gpt(tied=tied)
        self.fused = fused

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        x = self.inner.embedding(batch)
        for block in self.inner.blocks:
            x = block(x)
        hidden = self.inner.norm(x)[:, :-1].flatten(0, 1)
        targets = batch[:, 1:].flatten()
        if self.fused:
            logits = torch.cat([hidden[i : i + 4] @ self.inner.head.weight.T for i in range(0, len(hidden), 4)])
        else:
            logits = hidden @ self.inner.embedding.weight.T
        return F.cross_entropy(logits, targets)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize(("tied", "fused"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_forward_uses_weights_of_modules_that_it_does_not_call(
    tied: bool, fused: bool, home: str, tmp_path: Path
) -> None:
    check(lambda s: s.steps(3), home, tmp_path, build=lambda: Reader(tied=tied, fused=fused))


# -------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("name", READS)
def test_a_read_gives_the_current_values(name: str, home: str, tmp_path: Path) -> None:
    check(READS[name], home, tmp_path)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_reaches_the_next_forward_and_the_step(name: str, home: str, tmp_path: Path) -> None:
    check(WRITES[name], home, tmp_path)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_use_in_the_loss_is_differentiated(name: str, home: str, tmp_path: Path) -> None:
    check(LOSSES[name], home, tmp_path)


@pytest.mark.parametrize("home", ["device", "disk"])
def test_a_frozen_parameter_is_edited_inside_gathered_and_in_place(home: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = gpt()
        model.head.requires_grad_(False)
        return model

    def case(s: Script) -> None:
        s.steps()
        if s.session is None:
            with torch.no_grad():
                s.model.head.weight.mul_(0.5)
        else:
            with s.session.gathered(s.model.head) as values:
                values["head.weight"].mul_(0.5)
        s.see(s.model.head.weight)
        s.steps()
        with torch.no_grad():
            s.model.head.weight.add_(0.01)
        s.see(s.model.head.weight)
        s.steps()

    check(case, home, tmp_path, build=build)


@pytest.mark.parametrize("home", ["device", "disk"])
def test_a_tensor_that_was_read_before_a_step_cannot_be_written_after_it(home: str, tmp_path: Path) -> None:
    def case(s: Script) -> None:
        head = s.model.head.weight.data
        s.steps()
        with pytest.raises(ParameterWritten, match=r"mul_ .*'head.weight' before"):
            head.mul_(2)

    outcome(case, home, tmp_path)


@pytest.mark.parametrize("name", ["set_", "share_memory_", "resize_"])
def test_what_would_move_a_parameter_is_refused_by_name(name: str, tmp_path: Path) -> None:
    def case(s: Script) -> None:
        arguments = {"set_": [torch.zeros(3)], "resize_": [3, 3]}.get(name, [])
        with torch.no_grad(), pytest.raises(ParameterWritten, match=f"{name} was called on parameter 'head.weight'"):
            getattr(s.model.head.weight, name)(*arguments)

    outcome(case, "host", tmp_path)


def test_data_of_another_shape_is_refused(tmp_path: Path) -> None:
    def case(s: Script) -> None:
        with pytest.raises(ParameterWritten, match=r"'norm.weight' of shape \(32,\)"):
            s.model.norm.weight.data = torch.zeros(3)

    outcome(case, "disk", tmp_path)


def test_a_write_with_gradients_on_is_refused_as_torch_does(tmp_path: Path) -> None:
    def case(s: Script) -> None:
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            s.model.head.weight.mul_(2)
        s.steps()

    check(case, "disk", tmp_path)


def test_bf16_parameters_have_their_own_dtype_between_forwards_and_the_working_one_within(tmp_path: Path) -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    model.blocks[0].register_forward_hook(lambda m, a, o: seen.append(model.head.weight.dtype))
    with enable(model, optimizer, "disk", tmp_path, precision="bf16"):
        assert model.head.weight.dtype is torch.float32
        masters = model.head.weight.detach()
        model(tokens(0)).backward()
        optimizer.step()
        assert not torch.equal(masters, model.head.weight)
        after = model.head.weight.detach().clone()
    assert seen == [torch.bfloat16]
    assert torch.equal(after, model.head.weight)


def test_all_homes_give_the_same_bits(tmp_path: Path) -> None:
    def case(s: Script) -> None:
        for _ in range(2):
            s.finish(s.loss() + 1e-3 * s.model.head.weight.square().sum())
            with torch.no_grad():
                s.model.norm.weight.clamp_(0.5, 0.9999)
                s.model.head.weight.data[3].mul_(0.5)
            s.see(*s.model.parameters())

    expected = outcome(case, "device", tmp_path)
    for home in ("host", "disk"):
        found = outcome(case, home, tmp_path)
        assert found.losses == expected.losses
        assert all(torch.equal(a, b) for a, b in zip(found.seen, expected.seen, strict=True))


def test_reads_are_counted(tmp_path: Path) -> None:
    model = gpt()
    with enable(model, None, "disk", tmp_path) as session:
        model.head.weight.norm()
        assert session.timeline.counter("parameters read outside their modules") == 1
        assert session.timeline.counter("bytes of parameters read outside their modules") == 96 * 32 * 4
    assert type(model.head.weight) is nn.Parameter


def test_after_the_session_parameters_have_their_own_class_again(tmp_path: Path) -> None:
    model = gpt()
    session = enable(model, None, "disk", tmp_path)
    assert isinstance(model.head.weight, nn.Parameter)
    assert type(model.head.weight) is not nn.Parameter
    session.close()
    assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_a_placeholder_that_outlives_its_session_says_so(tmp_path: Path) -> None:
    model = gpt()
    session = enable(model, None, "disk", tmp_path)
    session.close(give_back=False)
    with pytest.raises(offload.errors.SessionClosedError):
        model.head.weight.norm()
