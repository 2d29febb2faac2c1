"""Saving and loading need a few chunks of memory, whatever the state holds."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.checkpoint.format import writer
from offload.checkpoint.format.load import load
from offload.checkpoint.format.reader import BUFFER_BYTES, Checkpoint
from offload.checkpoint.format.save import CheckpointJob
from offload.checkpoint.format.state import Item, Run
from offload.units import MIB
from tests.checkpoint.memory import peak_growth_bytes, trainable

NUMEL = 8 * MIB
CHUNK_NUMEL = 256 * 1024
STATE_BYTES = 3 * 4 * NUMEL
ALLOWED_BYTES = 3 * 4 * CHUNK_NUMEL + 2 * BUFFER_BYTES + 4 * MIB
"""Three chunks in fp32; the buffer that checksums are made in, and as much for conversions; what malloc keeps."""


class Endless:
    """A state that is computed as it is asked for, and compared as it comes back."""

    def __init__(self, moments: str = "fp32") -> None:
        self.item = trainable("w", (NUMEL,), moments=moments)
        self._scratch = {
            state_tensor.dtype: torch.empty(CHUNK_NUMEL, dtype=state_tensor.dtype)
            for state_tensor in self.item.state_tensors
        }
        self.num_written = 0

    def items(self) -> list[Item]:
        return [self.item]

    def runs(self) -> list[Run]:
        return [
            Run(
                "w",
                state_tensor.name,
                start // state_tensor.block_numel,
                (start + CHUNK_NUMEL) // state_tensor.block_numel,
            )
            for start in range(0, NUMEL, CHUNK_NUMEL)
            for state_tensor in self.item.state_tensors
        ]

    def values(self) -> Iterator[Tensor]:
        return (self._value(run) for run in self.runs())

    def write(self, run: Run, values: Tensor) -> None:
        if self.item.state_tensor("exp_avg").dtype is torch.float32:
            assert torch.equal(values, self._value(run))
        self.num_written += values.numel()

    def finish(self, steps: Mapping[str, int]) -> None:
        assert steps == {"w": 3}

    def _value(self, run: Run) -> Tensor:
        values = self._scratch[torch.float32][: run.numel]
        return values.fill_(float(run.start + len(run.state_tensor)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    CheckpointJob(tmp_path, Endless(), step=3, file_bytes=32 * MIB).run()
    return tmp_path


def test_the_peak_of_a_save_is_a_few_chunks(tmp_path: Path) -> None:
    source = Endless()
    job = CheckpointJob(tmp_path, source, step=3, file_bytes=32 * MIB)
    assert peak_growth_bytes(job.run) < ALLOWED_BYTES < STATE_BYTES / 4


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_the_peak_of_a_load_is_a_few_chunks_also_where_it_converts(saved: Path, moments: str) -> None:
    sink = Endless(moments)

    def work() -> None:
        with Checkpoint(saved) as checkpoint:
            load(checkpoint, sink)

    assert peak_growth_bytes(work) < ALLOWED_BYTES
    assert sink.num_written == sum(state_tensor.num_entries(NUMEL) for state_tensor in sink.item.state_tensors)


def test_a_file_is_open_only_while_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large checkpoint has more files than a process may have open."""
    monkeypatch.setattr(writer, "CUT_NUMEL", MIB)
    most = 0

    class Counting(Endless):
        def values(self) -> Iterator[Tensor]:
            nonlocal most
            for value in super().values():
                yield value
                open_files = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
                most = max(most, sum(path.readlink().is_relative_to(tmp_path) for path in open_files))

    saved = CheckpointJob(tmp_path, Counting(), step=3, file_bytes=4 * MIB).run()
    assert len(list(saved.folder.glob("*.safetensors"))) > 10
    assert most <= 4, "the lock, and one file for each state tensor"
