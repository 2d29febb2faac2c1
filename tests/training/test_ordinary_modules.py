"""Modules of ordinary models that use weights in their own ways: the bits that they have in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from offload.errors import ParameterWritten, UnsupportedModelError, UnsupportedOptimizerError
from tests.training.models import seeded
from tests.training.oracle import Oracle, adamw, assert_same_bits, enable, weights_of

WIDTH = 16
HOMES = ["device", "disk"]


def data(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (4, WIDTH)), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: Any, loss_of: Callable[[nn.Module, int], Tensor]) -> list[float]:
    losses = []
    for seed in range(3):
        loss = loss_of(model, seed)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def assert_same_as_in_memory(
    build: Callable[[], nn.Module],
    home: str,
    folder: Path,
    loss_of: Callable[[nn.Module, int], Tensor] = lambda model, seed: model(data(seed)).square().mean(),
) -> None:
    """Train and evaluate in memory with our kernel, and in a session: equal losses, outputs and weights."""
    expected, model = seeded(build), seeded(build)
    wanted = train(expected, Oracle(adamw(expected)), loss_of)
    optimizer = adamw(model)
    with enable(model, optimizer, home, folder):
        assert train(model, optimizer, loss_of) == wanted
        with torch.no_grad():
            assert torch.equal(loss_of(model.eval(), 9), loss_of(expected.eval(), 9))
    assert_same_bits(weights_of(model), weights_of(expected))


# -------------------------------------------------------------------- modules that use weights of their children


class Attention(nn.Module):
    """Attention of torch's own, by itself: it uses `out_proj.weight` and never calls `out_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[None]
        return self.last(self.attention(x, x, x)[0])


class EncoderLayer(nn.Module):
    """In evaluation it uses the weights of all its children at once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.first(x)[None])


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("build", [Attention, EncoderLayer])
def test_attention_of_torch_outside_a_list_of_blocks_trains(build: type[nn.Module], home: str, tmp_path: Path) -> None:
    assert_same_as_in_memory(build, home, tmp_path)


def test_attention_that_pools_a_real_models_output_trains(tmp_path: Path) -> None:
    def build() -> nn.Module:
        config = transformers.SiglipVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16,
            patch_size=8,
        )  # fmt: skip
        return transformers.SiglipVisionModel(config)

    def loss_of(model: nn.Module, seed: int) -> Tensor:
        return model(pixel_values=data(seed, 2, 3, 16, 16)).pooler_output.square().mean()

    assert_same_as_in_memory(build, "disk", tmp_path, loss_of)


class Queries(nn.Module):
    """Reads the weight of an embedding that it never calls, as DETR does; `is_owner` makes it an owner, too."""

    def __init__(self, *, is_owner: bool) -> None:
        super().__init__()
        self.queries = nn.Embedding(4, WIDTH)
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        if is_owner:
            self.register_parameter("own_queries", self.queries.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.queries.weight
        for block in self.blocks:
            x = torch.tanh(block(x))
        return F.linear(x, self.queries.weight)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("is_owner", [True, False])
def test_a_weight_used_outside_its_module_is_that_of_its_owner(is_owner: bool, home: str, tmp_path: Path) -> None:
    assert_same_as_in_memory(lambda: Queries(is_owner=is_owner), home, tmp_path)


class Lists(nn.Module):
    """Parameters in lists and dictionaries, which nobody calls, also of a list of such."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.full((WIDTH,), 1.5), torch.full((WIDTH,), 0.5)])
        self.shifts = nn.ModuleList([nn.ParameterDict({"shift": torch.ones(WIDTH)}) for _ in range(2)])
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for scale, shift, block in zip(self.scales, self.shifts, self.blocks, strict=True):
            x = block(x * scale) + shift["shift"]
        return x


@pytest.mark.parametrize("home", HOMES)
def test_parameters_in_lists_and_dictionaries_are_those_of_the_module_that_holds_them(
    home: str, tmp_path: Path
) -> None:
    assert_same_as_in_memory(Lists, home, tmp_path)


# ---------------------------------------------------------------------- hooks that were there before the session


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("home", HOMES)
def test_a_weight_that_a_hook_of_the_users_computes_trains(home: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH))

    assert_same_as_in_memory(build, home, tmp_path)


@pytest.mark.parametrize("home", HOMES)
def test_inputs_that_a_hook_of_the_users_makes_from_weights_get_their_gradients(home: str, tmp_path: Path) -> None:
    """The data need no gradient: only what the hook makes of them does, so the block's backward goes on behind it."""

    def build() -> nn.Module:
        model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
        for block in model:
            block.register_forward_pre_hook(lambda block, args: (args[0] * block[0].weight.mean() + block[0].bias,))
        return model

    assert_same_as_in_memory(build, home, tmp_path)


# ----------------------------------------------------------------------------------- losses that modules leave


class Routed(nn.Module):
    """Two experts; what the router's balance costs is left on the module, computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        shares = self.router(x).softmax(-1)
        y = x + sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        self.balance = self.router(x + y).softmax(-1).mean(0).square().sum()
        return y


@pytest.mark.parametrize("home", HOMES)
def test_a_loss_that_blocks_leave_on_themselves_is_part_of_the_backward(home: str, tmp_path: Path) -> None:
    def loss_of(model: Any, seed: int) -> Tensor:
        return model(data(seed)).square().mean() + sum(block[0].balance for block in model)

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(Routed()) for _ in range(3)))

    assert_same_as_in_memory(build, home, tmp_path, loss_of)


# ------------------------------------------------------------------------------------- what cannot be exact


def test_two_parameters_that_share_memory_are_refused_and_views_beside_each_other_are_not(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self, *starts: int) -> None:
            super().__init__()
            memory = data(0, 2 * WIDTH, WIDTH)
            self.weights = nn.ParameterList([nn.Parameter(memory[start : start + WIDTH]) for start in starts])

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weights[0] @ self.weights[1]

    model = Shared(0, WIDTH - 1)
    with pytest.raises(UnsupportedModelError, match=r"'weights\.0' and 'weights\.1' share memory.*or clone one"):
        enable(model, adamw(model), "device", tmp_path)
    assert_same_as_in_memory(lambda: Shared(0, WIDTH), "device", tmp_path)


class Clamped(nn.Linear):
    """Changes its weight in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


class Normed(nn.Module):
    """torch changes the rows that it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(4, WIDTH, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.rows(torch.arange(4))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("build", [lambda: Clamped(WIDTH, WIDTH), Normed])
def test_weights_changed_in_a_forward_are_refused(build: Callable[[], nn.Module], home: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), build())
    with (
        enable(model, adamw(model), home, tmp_path),
        pytest.raises(ParameterWritten, match=r"'1\.(rows\.)?weight' was changed in place in a forward.*gathered"),
    ):
        model(data(0))


def set_data(weight: nn.Parameter) -> None:
    weight.data = torch.zeros(WIDTH, WIDTH)


@pytest.mark.parametrize("write", [lambda weight: weight.data.fill_(0.0), set_data])
@pytest.mark.parametrize("home", HOMES)
def test_a_write_to_a_placeholder_reaches_the_weights_and_training_goes_on_with_it(
    write: Callable[[nn.Parameter], Any], home: str, tmp_path: Path
) -> None:
    def loss_of(model: nn.Module, seed: int) -> Tensor:
        return model(data(seed)).square().mean()

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))

    expected, model = seeded(build), seeded(build)
    write(expected.get_submodule("1").weight)  # type: ignore[arg-type]
    train(expected, Oracle(adamw(expected)), loss_of)
    optimizer = adamw(model)
    with enable(model, optimizer, home, tmp_path):
        write(model.get_submodule("1").weight)  # type: ignore[arg-type]
        train(model, optimizer, loss_of)
    assert_same_bits(weights_of(model), weights_of(expected))


def test_a_frozen_parameter_that_is_trained_now_is_refused_at_the_step(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    model[1].requires_grad_(False)
    optimizer = adamw(model)
    with enable(model, optimizer, "device", tmp_path):
        model(data(0)).mean().backward()
        optimizer.step()
        model[1].requires_grad_(True)
        model(data(1)).mean().backward()
        with pytest.raises(UnsupportedOptimizerError, match=r"'1\.weight' is trained now, and was frozen"):
            optimizer.step()
