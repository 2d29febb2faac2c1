"""Optimizers that are not torch's: the weights that plain torch gives, or an error that names the optimizer and why.

Those of other packages are tried where the package is installed. Every hazard that they have is in a small optimizer
here, too, so that it is tried without them.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import offload
from offload.errors import BudgetError, SessionFailedError, UnsupportedOptimizerError
from offload.optimizer.probe import reduced
from tests.training.models import VOCAB, seeded, tokens
from tests.training.oracle import HOMES, PLENTY, assert_same_bits, enable, run_steps, weights_of

BATCHES: Final = [{"tokens": tokens(i)} for i in range(6)]
WIDTH: Final = 64


class Block(nn.Module):
    """Parameters of every rank, with fewer and with more elements than the 4,096 from which state is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.blur = nn.Conv2d(1, 1, 3, padding=1)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.narrow = nn.Linear(WIDTH, 16, bias=False)
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """The residual block."""
        y = self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        y = self.down(torch.tanh(self.up(self.blur(y[:, None])[:, 0])))
        return x + self.gate * y + F.linear(self.narrow(y), self.narrow.weight.T)


class Net(nn.Module):
    """Token embedding, two blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting the next token."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def net() -> nn.Module:
    """The same weights at every call."""
    return seeded(Net)


Make = Callable[[nn.Module], torch.optim.Optimizer]


def assert_trained_as_by_torch(make: Make, home: str, folder: Path) -> None:
    """Losses and weights: the same bits."""
    reference = net()
    losses = run_steps(reference, make(reference), BATCHES)
    model = net()
    optimizer = make(model)
    with enable(model, optimizer, home, folder):
        assert run_steps(model, optimizer, BATCHES) == losses
    assert_same_bits(weights_of(model), weights_of(reference))


# ------------------------------------------------------------------------------------------- of other packages


@dataclass(frozen=True)
class Foreign:
    """One optimizer of another package."""

    module: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    """The reason; None: it is run."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def is_installed(self) -> bool:
        """The package is there."""
        return importlib.util.find_spec(self.module.split(".")[0]) is not None

    def make(self, model: nn.Module) -> torch.optim.Optimizer:
        """It, over all parameters."""
        made = getattr(importlib.import_module(self.module), self.name)(model.parameters(), **self.options)
        assert isinstance(made, torch.optim.Optimizer)
        return made


FOREIGN: Final = [
    Foreign("transformers", "Adafactor", {"lr": 1e-3, "relative_step": False, "scale_parameter": False}),
    Foreign("transformers", "Adafactor"),
]
INSTALLED: Final = [foreign for foreign in FOREIGN if foreign.is_installed]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("home", ["device", "disk"])
@pytest.mark.parametrize("foreign", INSTALLED, ids=str)
def test_an_optimizer_of_another_package_trains_as_by_torch_or_raises(
    foreign: Foreign, home: str, tmp_path: Path
) -> None:
    if foreign.refused is None:
        assert_trained_as_by_torch(foreign.make, home, tmp_path)
        return
    model = net()
    with pytest.raises(UnsupportedOptimizerError, match=f"(?s)optimizer {foreign.name} .*{foreign.refused}"):
        offload.enable(model, foreign.make(model), device="cpu", precision="fp32")


# ----------------------------------------------------------------------------------------- one for each hazard


class Own(torch.optim.Optimizer):
    """Gradient descent with state; kinds differ in `update`."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model.parameters(), {"lr": 0.05} | options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.update(p, p.grad, self.state[p], group), alpha=group["lr"])

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What is taken off, for each unit of the learning rate."""
        raise NotImplementedError


class CodesForLarge(Own):
    """Keeps its moment as bytes and a table of scales where a parameter has 4,096 elements, else as it is."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if p.numel() < 4096:
            moment = state.setdefault("moment", torch.zeros_like(p))
            return moment.mul_(0.9).add_(gradient)
        if "moment" not in state:
            state["moment"] = torch.zeros_like(p, dtype=torch.uint8).fill_(128)
            state["scales"] = torch.ones(p.numel() // 64)
        rows = (state["moment"].view(-1, 64).float() - 128) / 127 * state["scales"][:, None]
        rows = rows * 0.9 + gradient.view(-1, 64)
        state["scales"].copy_(rows.abs().amax(1).clamp_(min=1e-12))
        state["moment"].copy_((rows / state["scales"][:, None] * 127 + 128).round_().to(torch.uint8).view(p.shape))
        return rows.view(p.shape)


class FactorsForMatrices(Own):
    """Keeps sums over rows and columns of matrices, and a moment of the parameter's shape for all else."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        squares = gradient.square()
        if p.ndim < 2:
            return gradient / state.setdefault("squares", torch.zeros_like(p)).add_(squares).sqrt().add_(1e-3)
        squares = squares.flatten(1)
        rows = state.setdefault("squares", torch.zeros(p.shape[0])).add_(squares.mean(1))
        columns = state.setdefault("columns", torch.zeros(squares.shape[1])).add_(squares.mean(0))
        return gradient / (rows[:, None] * columns / rows.mean()).sqrt().add_(1e-3).view(p.shape)


class MomentForConvolutions(Own):
    """Keeps a moment for parameters of three dimensions and more, nothing for others."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if p.ndim < 3:
            return gradient
        return state.setdefault("moment", torch.zeros_like(p)).mul_(0.9).add_(gradient)


class LateState(Own):
    """Makes its moment at the second step."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["step"] = state.get("step", 0) + 1
        if state["step"] == 1:
            return gradient
        return state.setdefault("moment", torch.zeros_like(p)).mul_(0.9).add_(gradient)


class FirstGroupsRate(Own):
    """Takes the rate of the first group for all."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        taken = list(model.parameters())
        self.param_groups[0]["params"] = taken[::2]
        self.add_param_group({"params": taken[1::2], "lr": 1.0})

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient * (self.param_groups[0]["lr"] / group["lr"])


EXACT: Final[list[type[Own]]] = [CodesForLarge, FactorsForMatrices, MomentForConvolutions, LateState, FirstGroupsRate]


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("cls", EXACT)
def test_state_of_any_form_trains_as_by_torch(cls: type[Own], home: str, tmp_path: Path) -> None:
    assert_trained_as_by_torch(cls, home, tmp_path)


class SharedKey(Own):
    """Counts its steps under a key of `state` that is no parameter, as MADGRAD does."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        self.state["k"] = self.state.get("k", 0) + 1  # type: ignore[index]
        super().step(closure)

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient / self.state["k"]  # type: ignore[index, operator]


class SharedScalar(Own):
    """Divides by what the group has summed up of gradients, from the second step on."""

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        before = group.get("sum", 0.0)
        group["sum"] = before + float(gradient.abs().sum())
        return gradient / (1.0 + state.setdefault("seen", before))


class SharedList(Own):
    """Keeps what it has seen in a list of its own, and uses it late."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.norms: list[float] = []

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        self.norms.append(float(gradient.norm()))
        return gradient / (1.0 if len(self.norms) < 100 else self.norms[-100])


class MovesWithoutGradient(Own):
    """Decays parameters that have no gradient, too."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(0.99)
        super().step(closure)

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient


class Inside(torch.optim.Optimizer):
    """Steps an optimizer inside, over the same parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.inside = torch.optim.SGD(model.parameters(), lr=0.1)
        super().__init__(model.parameters(), {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Of the one inside."""
        self.inside.step()


class RateByIdentity(Own):
    """Has rates of single parameters in a table by id."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.rates = {id(p): 1.0 + i for i, p in enumerate(model.parameters())}

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return gradient * self.rates.get(id(p), 1.0)


class NeedsClosure(Own):
    """Evaluates the loss itself."""

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("a closure, please")


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (SharedKey, r"state\['k'\]"),
        (SharedScalar, "in sum of group 0"),
        (SharedList, "in norms"),
        (MovesWithoutGradient, "changes parameters that have no gradient"),
        (Inside, "by its attribute 'inside'"),
        (RateByIdentity, "by its attribute 'rates'"),
        (NeedsClosure, "a closure, please"),
    ],
)
def test_what_a_session_cannot_step_raises_by_name_and_changes_nothing(
    cls: type[torch.optim.Optimizer], why: str
) -> None:
    model = net()
    before = weights_of(model)
    optimizer = cls(model)  # type: ignore[arg-type]
    options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    with pytest.raises(UnsupportedOptimizerError, match=f"(?s)optimizer {cls.__name__} .*{why}"):
        offload.enable(model, optimizer, device="cpu", precision="fp32")
    assert_same_bits(weights_of(model), before)
    assert not optimizer.state
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == options


# ---------------------------------------------------------------------------------------------- while it trains


class ChangesForm(Own):
    """Rounds its moment at the fifth step: `how` says to what."""

    how: Callable[[Tensor], Tensor]

    def update(self, p: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        state["step"] = state.get("step", 0) + 1
        moment = state.setdefault("moment", torch.zeros_like(p)).mul_(0.9).add_(gradient)
        if state["step"] == 5:
            self.change(state)
        return moment

    def change(self, state: dict[str, Any]) -> None:
        """What is not planned."""
        raise NotImplementedError


class OtherDtype(ChangesForm):
    """Of the moment."""

    def change(self, state: dict[str, Any]) -> None:
        state["moment"] = state["moment"].bfloat16()


class OtherShape(ChangesForm):
    """Of the moment."""

    def change(self, state: dict[str, Any]) -> None:
        state["moment"] = state["moment"].reshape(-1, 1)


class OtherKey(ChangesForm):
    """One more."""

    def change(self, state: dict[str, Any]) -> None:
        state["more"] = state["moment"].clone()


class KeyGone(ChangesForm):
    """The moment is taken away."""

    def change(self, state: dict[str, Any]) -> None:
        del state["moment"]


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (OtherDtype, r"Tensor of bfloat16, .*planned was: Tensor of float32"),
        (OtherShape, r"planned was: Tensor of float32, shape"),
        (OtherKey, r"state\['more'\].*planned was: nothing"),
        (KeyGone, r"nothing; planned was: Tensor of float32"),
    ],
)
def test_state_that_comes_back_in_another_form_than_planned_fails_the_session(
    cls: type[ChangesForm], what: str, tmp_path: Path
) -> None:
    model = net()
    optimizer = cls(model)
    message = f"(?s)optimizer {cls.__name__} .*{what}"
    with (
        pytest.raises((UnsupportedOptimizerError, SessionFailedError), match=message),
        enable(model, optimizer, "host", tmp_path),
    ):
        run_steps(model, optimizer, BATCHES)


@pytest.mark.parametrize("cls", [CodesForLarge, FactorsForMatrices])
def test_state_of_any_form_goes_on_from_a_checkpoint_and_outside(cls: type[Own], tmp_path: Path) -> None:
    reference = net()
    run_steps(reference, cls(reference), BATCHES)
    model = net()
    optimizer: torch.optim.Optimizer = cls(model)
    run_steps(model, optimizer, BATCHES[:1])
    with enable(model, optimizer, "disk", tmp_path) as session:
        run_steps(model, optimizer, BATCHES[1:3])
        session.save(tmp_path / "checkpoint")
    model = net()
    optimizer = cls(model)
    with enable(model, optimizer, "device", tmp_path) as session:
        session.load(tmp_path / "checkpoint")
        run_steps(model, optimizer, BATCHES[3:5])
    run_steps(model, optimizer, BATCHES[5:])
    assert_same_bits(weights_of(model), weights_of(reference))


def test_state_that_does_not_stream_is_in_the_budget() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    codes_bytes = 4 * (256 * 256 + 256 * 256 // 64 * 4)
    options = {"device": "cpu", "precision": "fp32", "device_memory": PLENTY}
    with offload.enable(model, CodesForLarge(model), host_memory=PLENTY, **options) as session:  # type: ignore[arg-type]
        needed = session.plan.host_bytes
    assert session.plan.build_bytes >= codes_bytes
    with pytest.raises(BudgetError, match="smallest host_memory"):
        offload.enable(model, CodesForLarge(model), host_memory=needed - codes_bytes, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), ()),
        ((7,), (7,)),
        ((4096, 4096), (256, 256)),
        ((50257, 768), (256, 256)),
        ((512, 256, 3, 3), (64, 64, 3, 3)),
        ((1_000_003,), (62464,)),
    ],
)
def test_clones_of_large_parameters_keep_rank_and_divisors(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert reduced(shape, 65_536) == expected
