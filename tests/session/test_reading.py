"""Reading and editing what has left the device: masters, gradients, state_dict, the report."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import SessionClosedError, UnsupportedModelError, UnsupportedOptimizerError
from offload.session import Session


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(2)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)), nn.Linear(64, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


HOMES = {"device": ("1GiB", "1GiB"), "host": ("40KiB", "1GiB"), "disk": ("40KiB", "180KiB")}


def offloaded(home: str, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, **more: object) -> Session:
    device, host = HOMES[home]
    return offload.enable(
        model, optimizer, device="cpu", device_memory=device, host_memory=host, disk=folder, precision="fp32", **more
    )


@pytest.mark.parametrize("home", HOMES)
def test_gathered_gradients_are_those_of_torch(home: str, tmp_path: Path) -> None:
    plain, _ = make()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    plain(x).square().sum().backward()
    model, optimizer = make()
    with offloaded(home, tmp_path, model, optimizer) as session:
        model(x).square().sum().backward()
        gradients = session.gathered_gradients()
        optimizer.step()
    assert gradients.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in plain.named_parameters():
        assert torch.equal(gradients[name], parameter.grad)


@pytest.mark.parametrize("home", HOMES)
def test_an_edit_of_gathered_masters_is_trained_on(home: str, tmp_path: Path) -> None:
    model, optimizer = make()
    x = torch.randn(3, 64)
    with offloaded(home, tmp_path, model, optimizer) as session:
        with torch.no_grad():
            before = model(x)
        with session.gathered() as masters:
            masters["4.weight"].zero_()
            masters["4.bias"].fill_(7.0)
        with torch.no_grad():
            after = model(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, torch.full_like(after, 7.0))
    assert torch.equal(model[4].bias.detach(), torch.full((8,), 7.0))


@pytest.mark.parametrize("home", HOMES)
def test_state_dict_inside_is_what_the_model_has_outside(home: str, tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded(home, tmp_path, model, optimizer):
        for _ in range(2):
            model(torch.ones(2, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        inside = {name: value.clone() for name, value in model.state_dict().items()}
    outside = model.state_dict()
    assert inside.keys() == outside.keys()
    for name in inside:
        assert torch.equal(inside[name], outside[name])


def test_the_result_of_a_step_names_its_norm(tmp_path: Path) -> None:
    plain, _ = make()
    x = torch.ones(2, 64)
    plain(x).sum().backward()
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    model, optimizer = make()
    with offloaded("host", tmp_path, model, optimizer) as session:
        session.backward(model(x).sum())
        result = session.step()
        assert result.grad_norm == pytest.approx(float(expected), rel=1e-6)
        assert (result.skipped, result.loss_scale) == (False, 1.0)
        assert "h2d" in session.report()


def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded("host", tmp_path, model, optimizer) as session:
        before = session.weights_sha256()
        (model(torch.ones(2, 64)).sum() * float("inf")).backward()
        assert session.step().skipped
        assert session.weights_sha256() == before
        assert session.timeline.counter("skipped steps") == 1
        optimizer.zero_grad()
        model(torch.ones(2, 64)).sum().backward()
        assert not session.step().skipped
        assert session.weights_sha256() != before


def test_a_closed_session_says_so(tmp_path: Path) -> None:
    model, optimizer = make()
    session = offloaded("host", tmp_path, model, optimizer)
    session.close()
    session.close()
    with pytest.raises(SessionClosedError):
        session.step()


@pytest.mark.parametrize("home", HOMES)
def test_load_state_dict_inside_sets_what_is_trained(home: str, tmp_path: Path) -> None:
    source, _ = make()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.5)
    model, optimizer = make()
    x = torch.randn(2, 64)
    with offloaded(home, tmp_path, model, optimizer):
        result = model.load_state_dict(source.state_dict())
        assert not result.missing_keys
        assert not result.unexpected_keys
        with torch.no_grad():
            assert torch.equal(model(x), source(x))
    for mine, theirs in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_load_state_dict_still_names_what_is_missing(tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded("host", tmp_path, model, optimizer):
        values = model.state_dict()
        del values["4.bias"]
        with pytest.raises(RuntimeError, match=r"4\.bias"):
            model.load_state_dict(values)


def test_load_state_dict_of_a_part_names_what_is_missing_and_nothing_else(tmp_path: Path) -> None:
    source, _ = make()
    model, optimizer = make()
    with torch.no_grad():
        source[1][0].weight.mul_(2)
    with offloaded("host", tmp_path, model, optimizer):
        values = source[1].state_dict()
        model[1].load_state_dict(values)
        del values["0.bias"]
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.bias\"\. *$"):
            model[1].load_state_dict(values)
    assert torch.equal(model[1][0].weight, source[1][0].weight)


@pytest.mark.parametrize("home", HOMES)
def test_the_optimizers_own_state_dict_is_whole(home: str, tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded(home, tmp_path, model, optimizer) as session:
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        inside, by_session = optimizer.state_dict(), session.state_dict()["optimizer"]
    outside = optimizer.state_dict()
    assert inside["param_groups"] == by_session["param_groups"] == outside["param_groups"]
    for found in (inside["state"], by_session["state"]):
        assert found.keys() == outside["state"].keys()
        for index, state in outside["state"].items():
            assert all(torch.equal(found[index][name], value) for name, value in state.items())


def test_loading_moments_into_the_optimizer_inside_is_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded("host", tmp_path, model, optimizer):
        optimizer.load_state_dict(optimizer.state_dict())  # nothing but options
        model(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        with pytest.raises(UnsupportedOptimizerError, match=r"before offload\.enable, or session\.load"):
            optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("of", [copy.deepcopy, pickle.dumps, lambda module: torch.save(module, io.BytesIO())])
def test_a_copy_of_placeholders_is_refused_and_one_of_the_model_made_outside(of: Any, tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded("host", tmp_path, model, optimizer):
        for module in (model, model[1]):
            with pytest.raises(UnsupportedModelError, match=r"copy .* Use model\.state_dict\(\) or session\.save"):
                of(module)
    of(model)


def test_moving_a_part_of_the_model_inside_is_refused(tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded("host", tmp_path, model, optimizer), pytest.raises(UnsupportedModelError, match="offloaded"):
        model[1].double()


@pytest.mark.parametrize("move", [lambda m: m.to("cpu"), lambda m: m.half(), lambda m: m.double()])
def test_moving_the_model_inside_is_refused_and_works_again_outside(move: object, tmp_path: Path) -> None:
    model, optimizer = make()
    with offloaded("host", tmp_path, model, optimizer), pytest.raises(UnsupportedModelError, match="offloaded"):
        move(model)  # type: ignore[operator]
    move(model)  # type: ignore[operator]
