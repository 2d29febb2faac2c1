"""Exported folders open with `from_pretrained` and give the same logits; what it saves can be imported."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.export_hf import Exported, export_hf
from offload.checkpoint.format.import_hf import HuggingFaceFolder
from offload.checkpoint.format.load import load
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.staging import STAGING, staged
from offload.errors import TransferError
from offload.units import MIB
from tests.checkpoint.memory import (
    Sink,
    State,
    buffer,
    frozen,
    peak_growth_bytes,
    random_state,
    save,
    small_model,
    trainable,
)
from tests.checkpoint.models import MODELS, gpt2, llama, logits, state_of, with_config


def exported(tmp_path: Path, state: State, **options: object) -> Exported:
    save(tmp_path / "checkpoint", state)
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        return export_hf(checkpoint, tmp_path / "out", **options)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


@pytest.mark.parametrize("shard_bytes", [10_000, 5_000_000_000])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_exported_model_gives_the_same_logits(tmp_path: Path, name: str, split: bool, shard_bytes: int) -> None:
    model = MODELS[name]()
    out = exported(tmp_path, state_of(model, split=split, num_frozen=1), shard_bytes=shard_bytes)
    opened, report = AutoModelForCausalLM.from_pretrained(
        with_config(model, tmp_path / "out"), output_loading_info=True
    )
    assert not any(report.values()), "no key is missing, unexpected or of another shape"
    assert torch.equal(logits(opened.eval()), logits(model))
    assert (len(out.files) > 2) == (shard_bytes == 10_000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_a_16_bit_export_opens_in_that_dtype_with_the_working_weights(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    model = MODELS[name]()
    state = state_of(model, split=True)
    exported(tmp_path, state, dtype=dtype)
    opened = AutoModelForCausalLM.from_pretrained(with_config(model, tmp_path / "out"), dtype=dtype).state_dict()
    assert opened.keys() == model.state_dict().keys()
    for item in state.items:
        cast = model.state_dict()[item.name].to(dtype).view(-1)
        expected = state.state_tensors[item.name, "weights"] if dtype is torch.bfloat16 else cast
        assert torch.equal(opened[item.name].view(-1), expected)


def test_bf16_is_rounded_as_training_rounds_it_from_either_kind_of_master(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    split = random_state([trainable("w", (300, 7), split=True)], rng)
    ties = (torch.arange(300 * 7, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    plain = random_state([trainable("w", (300, 7))], rng)
    plain.state_tensors["w", "master"] = ties
    exported(tmp_path / "split", split, dtype=torch.bfloat16)
    exported(tmp_path / "plain", plain, dtype=torch.bfloat16)
    assert torch.equal(tensors_in(tmp_path / "split" / "out")["w"].view(-1), split.state_tensors["w", "weights"])
    found = tensors_in(tmp_path / "plain" / "out")["w"].view(-1).view(torch.int16).int()
    assert torch.equal(found, torch.arange(1, 300 * 7 + 1, dtype=torch.int32)), "ties go away from zero"


def test_without_a_dtype_every_tensor_has_the_one_it_had_before_the_session(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    items = [
        replace(trainable("half", (5,)), dtype=torch.bfloat16), trainable("full", (5,)), frozen("frozen", (4, 2)),
        buffer("count", (), torch.int64), buffer("mask", (3,), torch.bool),
    ]  # fmt: skip
    exported(tmp_path, random_state(items, rng))
    found = {name: (t.dtype, tuple(t.shape)) for name, t in tensors_in(tmp_path / "out").items()}
    assert found == {item.name: (item.dtype, item.shape) for item in items}


def test_buffers_keep_their_dtype_whatever_is_asked_for(tmp_path: Path, rng: np.random.Generator) -> None:
    exported(tmp_path, random_state([trainable("w", (5,)), buffer("b", (3,))], rng), dtype=torch.float16)
    assert {name: t.dtype for name, t in tensors_in(tmp_path / "out").items()} == {
        "w": torch.float16,
        "b": torch.float32,
    }


def test_the_index_lists_every_tensor_once_and_no_file_is_longer_than_asked(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    state = random_state(small_model(), rng)
    out = exported(tmp_path, state, shard_bytes=2500)
    index = json.loads((out.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == {item.name for item in state.items} == tensors_in(out.folder).keys()
    assert index["metadata"]["total_size"] == out.num_bytes
    num_files = len(set(index["weight_map"].values()))
    assert set(index["weight_map"].values()) == {
        f"model-{n + 1:05d}-of-{num_files:05d}.safetensors" for n in range(num_files)
    }
    for name in out.files[:-1]:
        tensors = safetensors.torch.load_file(out.folder / name)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 2500


def test_other_names_of_tied_parameters_are_in_the_metadata(tmp_path: Path, rng: np.random.Generator) -> None:
    out = exported(tmp_path, random_state(small_model(), rng))
    with safetensors.safe_open(out.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embed.weight"}


# ------------------------------------------------------------------------------------------- what can go wrong


def test_a_folder_that_holds_a_model_is_not_touched(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    state = random_state(small_model(), rng)
    exported(tmp_path, state)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert before.keys() == {"config.json", "model.safetensors"}
    with pytest.raises(CheckpointError, match=r"model\.safetensors is there already"):
        exported(tmp_path, state)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_export_that_fails_while_its_files_appear_leaves_none_of_them(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def fail_at_the_second(source: str, target: str) -> None:
        if "00002-of" in str(target):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail_at_the_second)
        with pytest.raises(TransferError, match="00002-of"):
            exported(tmp_path, random_state(small_model(), rng), shard_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_what_a_killed_export_left_goes_with_the_next_one_and_what_a_living_one_writes_stays(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    out = tmp_path / "out"
    (out / f"{STAGING}dead").mkdir(parents=True)
    (out / f"{STAGING}dead" / "model.safetensors").write_bytes(b"half")
    with staged(out, taken=(), last="") as living:
        exported(tmp_path, random_state(small_model(), rng))
        assert {path.name for path in out.iterdir()} == {living.name, "model.safetensors"}


def test_a_damaged_checkpoint_is_not_exported_in_part(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = save(tmp_path / "checkpoint", random_state(small_model(), rng), file_bytes=2000)
    path = max(saved.folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with Checkpoint(tmp_path / "checkpoint") as checkpoint, pytest.raises(CorruptCheckpointError, match=str(path)):
        export_hf(checkpoint, tmp_path / "out", shard_bytes=1000)
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_no_model_is_stored_in_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(CheckpointError, match=r"dtype=torch\.int8: expected None or one of"):
        exported(tmp_path, random_state(small_model(), rng), dtype=torch.int8)


def test_the_peak_of_an_export_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    item = trainable("w", (6 * MIB,), split=True, moments="8bit")
    save(
        tmp_path / "checkpoint",
        State(
            [item],
            {
                ("w", state_tensor.name): torch.zeros(state_tensor.num_entries(item.numel), dtype=state_tensor.dtype)
                for state_tensor in item.state_tensors
            },
        ),
    )
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        # a chunk in fp32, what it is made of, and what malloc keeps; the tensor has 24 MiB
        assert peak_growth_bytes(lambda: export_hf(checkpoint, tmp_path / "out", dtype=torch.float32)) < 12 * MIB


# ------------------------------------------------------------------------------------------------------ import


@pytest.mark.parametrize("max_shard_size", ["10KB", "5GB"])
@pytest.mark.parametrize("name", MODELS)
def test_what_save_pretrained_wrote_is_loaded_bit_for_bit(tmp_path: Path, name: str, max_shard_size: str) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    state = state_of(model)
    sink = Sink(state.items)
    with HuggingFaceFolder(tmp_path, sink.items()) as reader:
        report = load(reader, sink)
    for item in state.items:
        assert torch.equal(sink.state.state_tensors[item.name, "master"], state.state_tensors[item.name, "master"])
        assert not sink.state.state_tensors[item.name, "exp_avg"].any()
    assert set(sink.steps.values()) == {0}
    assert not report.exact


def test_a_tied_parameter_may_stand_under_either_name_or_both(tmp_path: Path, rng: np.random.Generator) -> None:
    items = [replace(frozen("first", (4, 3), torch.float32), aliases=("second",))]
    values = torch.from_numpy(rng.standard_normal((4, 3)).astype(np.float32))
    path = tmp_path / "m.safetensors"
    for tensors in ({"second": values}, {"first": values}, {"first": values, "second": values.clone()}):
        safetensors.torch.save_file(tensors, path)
        sink = Sink(items)
        with HuggingFaceFolder(path, items) as reader:
            load(reader, sink)
        assert torch.equal(sink.state.state_tensors["first", "weights"], values.view(-1))
    safetensors.torch.save_file({"first": values, "second": values + 1}, path)
    with pytest.raises(CheckpointError, match=f"{path}: 'first' and 'second' differ"):
        HuggingFaceFolder(path, items)


def test_a_model_that_the_folder_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    sink = Sink(state_of(llama()).items)
    with (
        HuggingFaceFolder(tmp_path, sink.items()) as reader,
        pytest.raises(CheckpointError, match=rf"{tmp_path} is of another model: it lacks lm_head\.weight"),
    ):
        load(reader, sink)
    assert sink.num_writes == 0


def test_links_are_followed_as_the_cache_of_hugging_face_needs_it(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/model.safetensors")
    sink = Sink(state_of(model).items)
    with HuggingFaceFolder(tmp_path / "snapshot", sink.items()) as reader:
        load(reader, sink)
    assert sink.steps is not None


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", 3, None, ["a"]])
def test_an_index_that_leads_outside_is_refused(tmp_path: Path, name: object) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CorruptCheckpointError, match=str(index)):
        HuggingFaceFolder(tmp_path, [])


def test_damage_to_a_header_an_index_or_a_length_is_refused_by_name(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "good", max_shard_size="10KB")
    items = state_of(gpt2()).items

    def damage(path: Path, number: int) -> None:
        if number == 0:
            path.unlink()
        elif number == 1:
            os.truncate(path, path.stat().st_size - 9)
        elif number == 2:
            path.write_bytes(b"\xff" + path.read_bytes()[1:])
        else:
            path.write_bytes(path.read_bytes().replace(b"wte", b"wtf", 1))

    weight_map = json.loads((tmp_path / "good" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("model.safetensors.index.json", weight_map["transformer.wte.weight"]):
        for number in range(4):
            folder = tmp_path / f"{name}-{number}"
            shutil.copytree(tmp_path / "good", folder)
            damage(folder / name, number)
            with pytest.raises(CheckpointError, match=str(folder)):
                HuggingFaceFolder(folder, items)


def test_a_folder_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor .* save_pretrained"):
        HuggingFaceFolder(tmp_path, [])
