"""torch loads what we export to its format, and we load what torch saves in it, without running its pickle."""

import contextlib
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from offload.checkpoint.format import export_dcp as export_module
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.export_dcp import export_dcp
from offload.checkpoint.format.import_dcp import DistributedCheckpoint
from offload.checkpoint.format.load import load
from offload.checkpoint.format.reader import Checkpoint
from offload.errors import DiskFullError
from offload.units import MIB
from tests.checkpoint.memory import (
    Sink,
    State,
    fp32_moment,
    load_into,
    peak_growth_bytes,
    random_state,
    save,
    small_model,
    trainable,
)
from tests.checkpoint.models import gpt2, logits, state_of

# torch says so of its own calls without process groups
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


def exported(tmp_path: Path, state: State, **options: object) -> Path:
    save(tmp_path / "checkpoint", state)
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        return export_dcp(checkpoint, tmp_path / "out", **options).folder


@pytest.fixture
def small_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(export_module, "FILE_BYTES", 12_000)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.usefixtures("small_cuts")
def test_torch_loads_the_model_and_its_moments(tmp_path: Path, split: bool) -> None:
    model = gpt2()
    state = state_of(model, split=split, moments="8bit" if split else "fp32", num_frozen=1)
    folder = exported(tmp_path, state)
    assert len(list(folder.glob("*.distcp"))) > 10
    other = gpt2()
    trained = [item for item in state.items if item.kind == "trainable"]
    found = {
        "model": other.state_dict(),
        "optim": {
            "state": {
                item.name: {name: torch.empty(item.shape) for name in ("exp_avg", "exp_avg_sq")}
                | {"step": torch.tensor(0.0)}
                for item in trained
            }
        },
    }
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    assert torch.equal(logits(other), logits(model))
    for item in trained:
        moments = found["optim"]["state"][item.name]
        assert moments["step"] == 5
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[name].view(-1), fp32_moment(state, item, name))


def test_the_tool_of_torch_makes_one_file_of_it(tmp_path: Path) -> None:
    model = gpt2()
    dcp_to_torch_save(exported(tmp_path, state_of(model), dtype=torch.bfloat16), tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert found["model"].keys() == model.state_dict().keys(), "other names of tied parameters too"
    assert {tensor.dtype for tensor in found["model"].values()} == {torch.bfloat16}
    assert found["optim"]["state"].keys() == dict(model.named_parameters()).keys()


@pytest.mark.usefixtures("small_cuts")
def test_what_we_export_we_import_bit_for_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    # in a session frozen weights are bf16, before it they were fp32: exported so, they would come back "rounded"
    items = [
        replace(item, dtype=item.state_tensors[0].dtype) if item.kind == "frozen" else item for item in small_model()
    ]
    state = random_state(items, rng)
    folder = exported(tmp_path, state)
    sink = Sink(state.items)
    with DistributedCheckpoint(folder, sink.items()) as reader:
        report = load(reader, sink)
    assert sink.state.same_bits(state)
    assert sink.steps == {item.name: item.step for item in state.items if item.kind == "trainable"}
    assert report.exact


def test_what_torch_saved_of_a_trained_model_is_loaded(tmp_path: Path) -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        logits_now = model(torch.arange(8)[None]).logits
        logits_now.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions())
    dcp.save({"model": weights, "optim": states, "epoch": 3}, checkpoint_id=tmp_path, no_dist=True)
    sink = Sink(state_of(model).items)
    with DistributedCheckpoint(tmp_path, sink.items()) as reader:
        report = load(reader, sink)
    for name, parameter in model.named_parameters():
        assert torch.equal(sink.state.state_tensors[name, "master"], parameter.detach().view(-1))
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(sink.state.state_tensors[name, moment], optimizer.state[parameter][moment].view(-1))
    assert set(sink.steps.values()) == {2}
    assert report.exact


def test_weights_alone_also_without_a_prefix_start_with_moments_of_zero(tmp_path: Path) -> None:
    model = gpt2()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = state_of(model)
    sink = Sink(state.items)
    with DistributedCheckpoint(tmp_path, sink.items()) as reader:
        assert not load(reader, sink).exact
    for item in state.items:
        assert torch.equal(sink.state.state_tensors[item.name, "master"], state.state_tensors[item.name, "master"])
        assert not sink.state.state_tensors[item.name, "exp_avg"].any()


def test_a_tensor_in_boxes_of_any_cut_is_put_together(tmp_path: Path) -> None:
    """Two-dimensional shards, as tensor parallelism on top of data parallelism writes them."""
    values = torch.arange(7 * 6 * 2, dtype=torch.float32).reshape(7, 6, 2)
    boxes = [((0, 0, 0), (3, 6, 1)), ((0, 0, 1), (3, 6, 1)), ((3, 0, 0), (4, 2, 2)), ((3, 2, 0), (4, 4, 2))]

    class Boxes(export_module._Planner):
        def create_local_plan(self) -> dcp.SavePlan:
            items = []
            for number, (offsets, sizes) in enumerate(boxes):
                (item,) = export_module._write_items(self.entries["model.w"])
                chunk = export_module.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = export_module.replace(item.tensor_data, chunk=chunk)
                index = export_module.MetadataIndex("model.w", offsets, number)
                items.append(export_module.replace(item, index=index, tensor_data=data))
            return dcp.SavePlan(items)

        def resolve_data(self, write_item: object) -> torch.Tensor:
            chunk = write_item.tensor_data.chunk
            return values[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))].clone()

    item = trainable("w", values.shape)
    save(tmp_path / "checkpoint", random_state([item], np.random.default_rng(0)))
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        planner = Boxes(checkpoint, export_module.PlainTensors(checkpoint, None))
    dcp.save({}, storage_writer=export_module._Writer(tmp_path / "out", planner), planner=planner, no_dist=True)
    for chunk_numel in (5, 13, 1000):
        sink = Sink([item], chunk_numel=chunk_numel)
        with DistributedCheckpoint(tmp_path / "out", [item]) as reader:
            load(reader, sink)
        assert torch.equal(sink.state.state_tensors["w", "master"], values.view(-1))


@pytest.mark.parametrize("shift", [0, 1])
def test_a_tensor_of_a_very_large_job_is_checked_without_comparing_all_of_its_shards(
    tmp_path: Path, shift: int
) -> None:
    """Compared each with each, these 30,000 would take minutes for every tensor. Shifted, two of them overlap."""
    num = 30_000
    rows = [number - shift * (number == num - 1) for number in range(num)]
    chunks = [export_module.ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((1, 4))) for row in rows]
    properties = export_module.TensorProperties(dtype=torch.float32)
    stored = filesystem._StorageInfo("__0_0.distcp", 0, 16)
    described = export_module.Metadata(
        {"model.w": export_module.TensorStorageMetadata(properties, torch.Size((num, 4)), chunks)},
        storage_data={export_module.MetadataIndex("model.w", torch.Size((row, 0))): stored for row in rows},
    )
    (tmp_path / ".metadata").write_bytes(pickle.dumps(described))
    with contextlib.ExitStack() as stack:
        if shift:
            stack.enter_context(pytest.raises(CorruptCheckpointError, match="two chunks of the same elements"))
        with DistributedCheckpoint(tmp_path, [trainable("w", (num, 4))]) as reader:
            assert reader.items["w"].shape == (num, 4)


# ------------------------------------------------------------------------------------------- what can go wrong


class Evil:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_metadata_that_would_run_something_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(), rng)
    folder = exported(tmp_path, state)
    (folder / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Evil(tmp_path / "proof")}))
    with pytest.raises(CorruptCheckpointError, match=r"out/\.metadata .* it asks for posix\.mkdir"):
        DistributedCheckpoint(folder, state.items)
    assert not (tmp_path / "proof").exists()


def test_tensors_that_would_run_something_are_refused(tmp_path: Path) -> None:
    state = State([trainable("w", (3,))])
    state.state_tensors = {("w", state_tensor.name): torch.ones(3) for state_tensor in state.items[0].state_tensors}
    folder = exported(tmp_path, state)
    (path,) = folder.glob("*.distcp")
    content = path.read_bytes()
    evil = pickle.dumps(Evil(tmp_path / "proof"), protocol=2)
    path.write_bytes(evil + content[len(evil) :])
    with (
        DistributedCheckpoint(folder, state.items) as reader,
        pytest.raises(CorruptCheckpointError, match=rf"{path}: 'model\.w' cannot be read"),
    ):
        load(reader, Sink(state.items))
    assert not (tmp_path / "proof").exists()


def test_damage_is_refused_by_the_name_of_the_file(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(), rng)
    good = exported(tmp_path, state)

    def refused(damage: Callable[[Path], object], name: str) -> None:
        folder = tmp_path / "damaged"
        shutil.copytree(good, folder)
        damage(next(folder.glob(name)))
        sink = Sink(state.items)
        with (
            pytest.raises(CheckpointError, match=str(folder)),
            DistributedCheckpoint(folder, sink.items()) as reader,
        ):
            load(reader, sink)
        assert sink.num_writes == 0
        shutil.rmtree(folder)

    refused(Path.unlink, ".metadata")
    refused(Path.unlink, "*.distcp")
    for name in (".metadata", "*.distcp"):
        refused(lambda path: os.truncate(path, path.stat().st_size - 700), name)
        refused(lambda path: path.write_bytes(b""), name)
    metadata = (good / ".metadata").read_bytes()
    for outside in (b"../_0_0.distcp", b"/tmp/_0.distcp", b"__0_0_/.distcp"):
        assert metadata.count(b"__0_0_0.distcp")
        refused(lambda path, name=outside: path.write_bytes(metadata.replace(b"__0_0_0.distcp", name)), ".metadata")


def test_a_damaged_checkpoint_is_not_exported_and_named(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = save(tmp_path / "checkpoint", random_state(small_model(), rng))
    (path,) = saved.folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with Checkpoint(saved.folder) as checkpoint, pytest.raises(CorruptCheckpointError, match=str(path)):
        export_dcp(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_as_such(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = save(tmp_path / "checkpoint", random_state(small_model(), rng))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoint(saved.folder) as checkpoint:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
        try:
            with pytest.raises(DiskFullError, match=f"{tmp_path / 'out'}: no room"):
                export_dcp(checkpoint, tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_checkpoint_is_not_exported_into(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state([trainable("w", (3,))], rng)
    exported(tmp_path, state)
    with pytest.raises(CheckpointError, match=r"\.distcp is there already"):
        exported(tmp_path, state)


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = exported(tmp_path, random_state(small_model(), rng))
    sink = Sink([trainable("w", (3,))])
    with (
        DistributedCheckpoint(folder, sink.items()) as reader,
        pytest.raises(CheckpointError, match=f"{folder} is of another model"),
    ):
        load(reader, sink)


def test_the_peak_of_an_export_is_a_file_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "CHUNK_BYTES", MIB)
    monkeypatch.setattr(export_module, "FILE_BYTES", 2 * MIB)
    item = trainable("w", (2 * MIB,))
    save(tmp_path / "checkpoint", State([item], {("w", p.name): torch.zeros(item.numel) for p in item.state_tensors}))
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        # a file, the chunk that follows it, and what torch.save and malloc keep; the state has 24 MiB
        assert peak_growth_bytes(lambda: export_dcp(checkpoint, tmp_path / "out")) < 12 * MIB


def test_a_checkpoint_of_our_own_is_no_distributed_one(tmp_path: Path, rng: np.random.Generator) -> None:
    state = random_state(small_model(), rng)
    saved = save(tmp_path, state)
    with pytest.raises(CheckpointError, match=rf"{saved.folder} holds no \.metadata"):
        DistributedCheckpoint(saved.folder, state.items)
    assert load_into(tmp_path, state.items)[1].exact
