"""The user's dictionary, scheduler and random states: back as they were, or refused by their path before a byte."""

import enum
import functools
import math
import random
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.user_data import encode, random_states, set_random_states
from tests.checkpoint.memory import random_state, save, trainable


def round_trip(root: Path, extra: dict[str, object]) -> dict[str, object]:
    save(root, random_state([trainable("w", (3,))], np.random.default_rng(0)), extra=extra)
    with Checkpoint(root) as checkpoint:
        return checkpoint.extra()


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 2**80, 0.1, -0.0, math.inf, -math.inf, 5e-324, "", "naïve \ud800 \0 text",
        [], (), {}, [1, (2, [])],
        {"$tensor": 0}, {"$": {"$tuple": [1]}}, {1: "int", None: 2, False: 3}, {"1": "a", "a": {"b": (1,)}},
        Counter({"a": 2, 3: 1}), OrderedDict([("b", 1), ("a", 2)]),
    ],
)  # fmt: skip
def test_plain_values_come_back_equal_and_of_their_type(tmp_path: Path, value: object) -> None:
    found = round_trip(tmp_path, {"value": value})["value"]
    assert found == value
    assert repr(found) == repr(value)
    assert type(found) is type(value)


def test_nan_and_numbers_of_numpy_come_back_as_python_numbers(tmp_path: Path) -> None:
    found = round_trip(tmp_path, {"nan": math.nan, "f": np.float32(0.5), "i": np.int64(7), "b": np.bool_(True)})
    assert math.isnan(found.pop("nan"))
    assert found == {"f": 0.5, "i": 7, "b": True}
    assert [type(value) for value in found.values()] == [float, int, bool]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).t(), torch.empty(0, 4), torch.tensor(3.5), torch.tensor([True, False]),
        torch.tensor([1 + 2j, -3.5j]).conj(), torch.tensor([1 + 2j]).conj().imag, torch.arange(8)[::3],
        torch.nn.Parameter(torch.ones(2)), torch.ones(1).expand(5), torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
    ],
    ids=str,
)  # fmt: skip
def test_tensors_come_back_bit_for_bit_whatever_their_strides(tmp_path: Path, tensor: torch.Tensor) -> None:
    found = round_trip(tmp_path, {"deep": [{"in": (tensor,)}]})["deep"][0]["in"][0]
    assert found.dtype is tensor.dtype
    assert torch.equal(found, tensor) or torch.equal(found.isnan(), tensor.isnan())
    assert not found.requires_grad


@pytest.mark.parametrize(
    "array", [np.arange(6.0)[::-2], np.array(3, dtype=np.int8), np.zeros((0, 2), dtype=np.uint32), np.array([[True]])]
)
def test_arrays_come_back_as_arrays(tmp_path: Path, array: np.ndarray) -> None:
    found = round_trip(tmp_path, {"array": array})["array"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(found, array)


class Colour(enum.IntEnum):
    RED = 1


class Special(torch.Tensor):
    """What makes it special would not be saved."""


RECURSIVE: list[object] = []
RECURSIVE.append(RECURSIVE)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (lambda: None, "builtins.function"),
        (functools.partial(int), "functools.partial"),
        ({1, 2}, "builtins.set"),
        (defaultdict(list), "collections.defaultdict"),
        (Colour.RED, "Colour"),
        (b"bytes", "builtins.bytes"),
        (1j, "builtins.complex"),
        (Path(), "PosixPath"),
        (torch.float32, "torch.dtype"),
        (np.array([object()]), "array of object"),
        (np.array(["text"]), "cannot hold"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (np.arange(3, dtype=">i4"), "cannot hold"),
        (torch.eye(2).to_sparse(), "plain, dense tensor"),
        (torch.empty(2, device="meta"), "on meta"),
        (torch.ones(1).as_subclass(Special), "plain, dense tensor"),
        ({(1, 2): 3}, "has the key"),
        ({"k": {1.5: 3}}, "has the key"),
        (RECURSIVE, "does it contain itself"),
        (2**10000, "int of 10001 bits"),
        (np.datetime64("2020-01-01"), "numpy number"),
        (np.datetime64("2020-01-01", "ns"), "numpy number"),
        (np.timedelta64(5, "ns"), "numpy number"),
    ],
)
def test_anything_else_is_refused_with_its_path_before_a_byte_is_written(
    tmp_path: Path, value: object, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        save(tmp_path / "root", random_state([], np.random.default_rng(0)), extra={"a": [0, {"b c": (value,)}]})
    assert str(caught.value).startswith("extra['a'][1]['b c'][0]")
    assert not (tmp_path / "root").exists()


def test_what_the_user_does_to_a_tensor_after_the_call_is_not_saved(tmp_path: Path) -> None:
    tensor = torch.zeros(4)
    coded, tensors = encode({"t": tensor}, name="extra")
    assert (coded, len(tensors)) == ({"t": {"$tensor": 0}}, 1)
    assert round_trip(tmp_path, {"t": tensor.add_(1)})["t"].tolist() == [1] * 4


def test_a_scheduler_goes_on_where_it_was(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    state = {key: value for key, value in scheduler.state_dict().items() if not callable(value)}
    found = round_trip(tmp_path, {"scheduler": state})["scheduler"]
    assert found == state


def test_random_states_give_the_same_numbers_again(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(torch.randn(()))

    random.gauss(0, 1)
    np.random.standard_normal()
    states = random_states(devices={"cuda:0": torch.arange(16, dtype=torch.uint8)})
    expected = draw()
    found = round_trip(tmp_path, {"random": states})["random"]
    devices = set_random_states(found)
    assert draw() == expected
    assert devices["cuda:0"].tolist() == list(range(16))


def test_random_states_of_no_generator_are_refused() -> None:
    with pytest.raises(CheckpointError, match="random states"):
        set_random_states({"python": (3, (1, 2), None)})
