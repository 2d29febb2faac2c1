"""What was saved is what is loaded: bits, steps, user data, and files that other programs read."""

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from offload.checkpoint.format import writer as writer_module
from offload.checkpoint.format.load import load
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.save import CheckpointJob
from offload.checkpoint.format.state import Item, Kind, StateTensor
from offload.errors import TransferError
from tests.checkpoint.memory import Sink, Source, load_into, random_state, raw, save, small_model, trainable


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("split", [False, True])
def test_equal_encodings_come_back_bit_for_bit(
    tmp_path: Path, rng: np.random.Generator, split: bool, moments: str
) -> None:
    state = random_state(small_model(split=split, moments=moments), rng)
    save(tmp_path, state)
    loaded, report = load_into(tmp_path, state.items)
    assert loaded.same_bits(state)
    assert report.exact
    assert report.notes == ()


@pytest.mark.parametrize("split", [False, True])
def test_every_bit_pattern_is_kept_also_those_of_nan(tmp_path: Path, rng: np.random.Generator, split: bool) -> None:
    state = random_state([trainable("w", (5000,), split=split)], rng)
    for values in state.state_tensors.values():
        raw(values)[:] = torch.from_numpy(rng.integers(0, 256, raw(values).numel(), dtype=np.uint8))
    save(tmp_path, state)
    assert load_into(tmp_path, state.items)[0].same_bits(state)


def test_steps_are_those_of_each_parameter(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(), rng)
    save(tmp_path, state)
    sink = Sink(state.items)
    with Checkpoint(tmp_path) as checkpoint:
        load(checkpoint, sink)
    assert sink.steps == {"embed.weight": 3, "block.0.weight": 7, "block.0.bias": 3, "empty": 3}


def test_names_aliases_shapes_and_order_are_kept(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(), rng)
    save(tmp_path, state, step=12)
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.items.values()) == state.items
        assert (checkpoint.step, checkpoint.world_size) == (12, 1)


def test_the_safetensors_library_reads_every_file(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(split=True, moments="8bit"), rng)
    saved = save(tmp_path, state, extra={"t": torch.arange(3)}, file_bytes=4096)
    seen = {}
    files = sorted(saved.folder.glob("*.safetensors"))
    for path in files:
        with safetensors.safe_open(path, "pt") as file:
            seen |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    assert len(files) > 1
    assert torch.equal(seen["weights/.extra.user.0[0:3]"], torch.arange(3))
    weights = state.state_tensors["embed.weight", "weights"]
    assert torch.equal(raw(seen[f"weights/embed.weight[0:{weights.numel()}]"]), raw(weights))


def test_the_manifest_lists_name_numel_dtype_start_end_file_checksum(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = save(tmp_path, random_state([trainable("w", (10,))], rng))
    body = json.loads((saved.folder / "manifest.json").read_text())["manifest"]
    assert body["items"][0]["numel"] == 10
    assert {"name": "w", "plane": "master", "dtype": "F32", "start": 0, "end": 10}.items() <= body["pieces"][0].items()
    assert {"file", "checksum"} <= body["pieces"][0].keys()


def test_a_state_tensor_longer_than_a_cut_is_several_tensors(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "CUT_NUMEL", 768)  # chunks of 512 end inside tensors and at their borders
    state = random_state([trainable("w", (50, 50))], rng)
    saved = save(tmp_path, state, file_bytes=7000)
    body = json.loads((saved.folder / "manifest.json").read_text())["manifest"]
    master = [(chunk["start"], chunk["end"]) for chunk in body["pieces"] if chunk["plane"] == "master"]
    assert master == [(0, 768), (768, 1536), (1536, 2304), (2304, 2500)]
    assert load_into(tmp_path, state.items)[0].same_bits(state)


def test_the_future_of_a_job_tells_what_is_on_the_disk_or_why_nothing_is(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    state = random_state(small_model(), rng)
    job = CheckpointJob(tmp_path, Source(state), step=1)
    assert not job.durable.done()
    thread = threading.Thread(target=job.run)
    thread.start()
    thread.join()
    assert job.durable.result().folder == tmp_path / "step-00000001"
    (tmp_path / "file").touch()
    job = CheckpointJob(tmp_path / "file" / "below", Source(state), step=1)
    with pytest.raises(TransferError, match="file/below: could not make it: Not a directory"):
        job.run()
    with pytest.raises(TransferError, match="Not a directory"):
        job.durable.result()


def test_a_model_without_parameters_can_be_saved(tmp_path: Path) -> None:
    state = random_state([], np.random.default_rng(0))
    save(tmp_path, state, extra={"a": 1})
    assert load_into(tmp_path, [])[0].same_bits(state)


def test_every_dtype_of_a_buffer_is_kept(tmp_path: Path) -> None:
    dtypes = [torch.bool, torch.int8, torch.int64, torch.float64, torch.float16, torch.complex64, torch.float8_e4m3fn]
    items = [
        Item(name=f"b{i}", kind=Kind.BUFFER, shape=(3,), dtype=d, state_tensors=(StateTensor("weights", d),))
        for i, d in enumerate(dtypes)
    ]
    state = random_state([], np.random.default_rng(0))
    state.items = items
    state.state_tensors = {(item.name, "weights"): torch.tensor([1, 0, 1]).to(item.dtype) for item in items}
    save(tmp_path, state)
    assert load_into(tmp_path, items)[0].same_bits(state)


def test_nothing_is_written_to_a_sink_of_another_model(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(), rng)
    save(tmp_path, state)
    with Checkpoint(tmp_path) as checkpoint:
        for items, words in (
            ([*state.items, trainable("more", (3,))], "lacks more"),
            (state.items[1:], "embed.weight besides"),
            ([replace(state.items[0], shape=(16, 37)), *state.items[1:]], r"shape \[16, 37\] in the model"),
        ):
            sink = Sink(items)
            with pytest.raises(ValueError, match=words):
                load(checkpoint, sink)
            assert (sink.num_writes, sink.steps) == (0, None)


def test_a_source_may_be_read_while_files_are_tiny_and_its_tensors_are_lent(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """`Source` overwrites what it lent as soon as the next is asked for: a writer that keeps it would save 0xA5."""
    state = random_state(small_model(), rng)
    save(tmp_path, state, file_bytes=1)
    assert load_into(tmp_path, state.items)[0].same_bits(state)
    assert len(Source(state).runs()) > 8
