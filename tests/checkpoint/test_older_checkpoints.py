"""A checkpoint that an older version of the library wrote is loaded, bit for bit."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload

SAVED = Path(__file__).parent / "data" / "version-1"
"""Split masters (weights and remainders), 8-bit moments, a frozen bias, buffers; two steps. `extra` holds digests."""


def build() -> nn.Sequential:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(2))
    model = nn.Sequential(*blocks, nn.Linear(8, 2, bias=False))
    model[0][0].bias.requires_grad_(False)
    return model


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def digests(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {name: digest(tensor) for name, tensor in state["model"].items()},
        "moments": {
            str(index): {name: digest(tensor) for name, tensor in moments.items()}
            for index, moments in state["optimizer"]["state"].items()
        },
    }


def test_a_checkpoint_of_an_older_version_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    shutil.copytree(SAVED, tmp_path / "run")
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3.0)
    with offload.enable(
        model, optimizer, device="cpu", device_memory="4KiB", host_memory="256KiB", state_dtype="8bit"
    ) as session:
        loaded = session.load(tmp_path / "run")
        assert (loaded.step, loaded.exact, loaded.notes) == (2, True, ())
        assert digests(session.state_dict()) == loaded.extra
        assert optimizer.param_groups[0]["lr"] == 1e-2


def test_what_is_saved_now_has_the_fields_of_the_older_version(tmp_path: Path) -> None:
    """An older version of the library reads the manifest by these names."""
    model = build()
    with offload.enable(
        model, torch.optim.AdamW(model.parameters()), device="cpu", device_memory="4KiB", host_memory="256KiB",
        state_dtype="8bit",
    ) as session:  # fmt: skip
        session.load(SAVED)
        session.save(tmp_path / "run", extra=session.load(SAVED).extra)
    assert (tmp_path / "run" / "step-00000002" / "manifest.json").read_bytes() == next(
        SAVED.glob("step-*/manifest.json")
    ).read_bytes()
