"""The model of `offload train`: its size, its shape, and that it can be built without memory."""

import math

import pytest
import torch

from offload.cli.gpt import GPT, PRESETS, SIZE_TOLERANCE, GPTConfig, config_for, parse_count
from offload.errors import ConfigError

TINY = GPTConfig(width=64, depth=2, seq=16)


@pytest.mark.parametrize("seq", [16, 128, 2048])
@pytest.mark.parametrize("count", [*PRESETS, 200_000, 1_000_000, 3_333_333, 60_000_000, 350_000_000, 7_000_000_000])
def test_a_model_has_the_number_of_parameters_asked_for(count: int, seq: int) -> None:
    config = config_for(count, seq=seq)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in GPT(config).parameters())
    assert num_parameters == config.num_parameters
    assert abs(num_parameters - count) <= SIZE_TOLERANCE * count


@pytest.mark.parametrize("count", PRESETS)
def test_the_named_sizes_have_their_own_shape(count: int) -> None:
    config = config_for(count, seq=128)
    assert (config.width, config.depth) == PRESETS[count]


@pytest.mark.parametrize("count", [*PRESETS, 60_000_000])
def test_one_block_is_a_small_share_of_the_model(count: int) -> None:
    assert config_for(count, seq=128).depth >= 6


def test_a_model_too_small_to_exist_is_refused_with_the_smallest_one() -> None:
    with pytest.raises(ConfigError, match=r"the smallest has \d"):
        config_for(1000, seq=128)


@pytest.mark.parametrize(("text", "count"), [("5m", 5_000_000), ("1B", 10**9), ("1.5b", 1_500_000_000), ("77", 77)])
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "m", "5x", "-5m", "0", "0m", "five"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="number of parameters"):
        parse_count(text)


def test_each_module_that_owns_parameters_fills_all_of_them() -> None:
    with torch.device("meta"):
        model = GPT(TINY)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, math.nan)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not list(model.buffers())


def test_the_first_loss_is_that_of_a_uniform_guess(rng) -> None:
    model = GPT(TINY)
    tokens = torch.from_numpy(rng.integers(0, 256, size=(4, 17)))
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(math.log(256), abs=0.1)


def test_no_position_sees_a_later_one() -> None:
    model = GPT(TINY)
    tokens = torch.arange(16)[None]
    changed = tokens.clone()
    changed[0, 8] = 200
    features = []
    model.norm.register_forward_hook(lambda module, args, output: features.append(output))
    model(tokens, tokens)
    model(changed, tokens)
    before, after = features
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
