"""Export to a folder that `torch.distributed.checkpoint` loads: weights, moments in fp32, steps.

Owns: the plan of what is written (chunks of rows), and how much the writer of torch holds at once.
Does not: write groups of hyper-parameters: load with `allow_partial_load` or into a dictionary without them.
Threads: one.

Note [The writer holds a file]: torch's writer keeps every tensor of a file until the file is closed. So tensors are
cut in chunks of rows, and a file ends after FILE_BYTES: that is the memory an export needs.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from offload.checkpoint.format.dcp_names import METADATA, STEP, SUFFIX, key_of, state_path, weight_path
from offload.checkpoint.format.dcp_names import Path as KeyPath
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.export_hf import Exported
from offload.checkpoint.format.plain import PlainTensors
from offload.checkpoint.format.staging import staged
from offload.checkpoint.format.state import WEIGHTS, StateReader
from offload.checkpoint.format.tensor_file import failing
from offload.errors import InternalError
from offload.units import MIB

FILE_BYTES: Final = 128 * MIB
CHUNK_BYTES: Final = 32 * MIB


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the export."""

    path: KeyPath
    item: str
    state_tensor: str
    """WEIGHTS, a moment or STEP."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return key_of(self.path)


def export_dcp(reader: StateReader, out: Path, *, dtype: torch.dtype | None = None) -> Exported:
    """Write an open checkpoint to `out`, in the memory of FILE_BYTES. `dtype`, of the weights: see PlainTensors."""
    plain = PlainTensors(reader, dtype)
    planner = _Planner(reader, plain)
    with staged(out, taken=(f"*{SUFFIX}", METADATA), last=METADATA) as folder:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as was asked for
                # The state dictionary is empty: the planner knows what there is.
                save({}, storage_writer=_Writer(folder, planner), planner=planner, no_dist=True)
        except CheckpointException as error:
            with failing(out, "write a file in it"):
                raise next(iter(error.failures.values()))[0] from error  # its cause: what was read, or the disk
        files = tuple(sorted(path.name for path in folder.iterdir()))
    total_bytes = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in planner.entries.values())
    return Exported(out, files, len(planner.entries), total_bytes)


def _entries(reader: StateReader, plain: PlainTensors) -> Iterator[_Entry]:
    for name, item in plain.weights.items():
        yield _Entry(weight_path(name), name, WEIGHTS, item.shape, item.dtype)
    for name, moments in plain.moments.items():
        for moment in moments:
            yield _Entry(state_path(name, moment), name, moment, reader.items[name].shape, torch.float32)
        yield _Entry(state_path(name, STEP), name, STEP, (), torch.float32)


class _Planner(SavePlanner):
    """Gives the writer one chunk after the other, read from the checkpoint when it is asked for."""

    def __init__(self, reader: StateReader, plain: PlainTensors) -> None:
        self.entries = {entry.key: entry for entry in _entries(reader, plain)}
        if len(self.entries) != len(plain.weights) + sum(len(moments) + 1 for moments in plain.moments.values()):
            raise CheckpointError(f"{reader.where}: two of its names are one when they are joined by dots.")
        self.aliases = {key_of(weight_path(name)): item.aliases for name, item in plain.weights.items()}
        self._plain = plain
        self._steps = {name: reader.items[name].step for name in plain.moments}

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: it was set up when it was made."""

    def create_local_plan(self) -> SavePlan:
        """All chunks of all tensors."""
        return SavePlan([item for entry in self.entries.values() for item in _write_items(entry)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The same, and what every tensor is made of."""
        tensors: dict[str, Any] = {}
        for plan in all_plans:
            for item in plan.items:
                data = _data_of(item)
                listed = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
                listed.chunks.append(data.chunk)
        return all_plans, Metadata(tensors, planner_data={key: entry.path for key, entry in self.entries.items()})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """A chunk, in memory of its own: the writer keeps it."""
        entry, data = self.entries[write_item.index.fqn], _data_of(write_item)
        if entry.state_tensor == STEP:
            return torch.tensor(float(self._steps[entry.item]))
        values = torch.empty(data.chunk.sizes, dtype=entry.dtype)
        start = data.chunk.offsets[0] * math.prod(entry.shape[1:]) if entry.shape else 0
        self._plain.read(entry.item, entry.state_tensor, start, values.view(-1))
        return values


def _write_items(entry: _Entry) -> Iterator[WriteItem]:
    """Chunks of whole rows."""
    size = torch.Size(entry.shape)
    row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
    num_rows = entry.shape[0] if entry.shape else 1
    step = max(CHUNK_BYTES // max(row_bytes, 1), 1)
    for number, row in enumerate(range(0, max(num_rows, 1), step)):
        offsets, sizes = list(entry.shape), list(entry.shape)
        if entry.shape:
            offsets, sizes[0] = [row] + [0] * (len(sizes) - 1), min(step, num_rows - row)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=entry.dtype), size=size)
        yield WriteItem(MetadataIndex(entry.key, offsets, number), WriteItemType.SHARD, tensor_data=data)


def _data_of(item: WriteItem) -> TensorWriteData:
    """What _write_items gave it."""
    if item.tensor_data is None:
        raise InternalError(f"{item.index} of an export is no tensor.")
    return item.tensor_data


class _Writer(FileSystemWriter):
    """torch's writer, a file at a time; see Note [The writer holds a file]."""

    def __init__(self, path: Path, planner: _Planner) -> None:
        super().__init__(path)
        self._planner = planner

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        """The files."""
        results: list[WriteResult] = []
        for number, items in enumerate(_files(plan.items)):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            results += super().write_data(replace(plan, items=items, storage_data=prefix), planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The metadata, in which every other name of a tied parameter means the same bytes."""
        written = [result for each in results for result in each]
        for key, aliases in self._planner.aliases.items():
            of_key = [result for result in written if result.index.fqn == key] if aliases else []
            for alias in aliases:
                path = weight_path(alias)
                metadata.state_dict_metadata[key_of(path)] = metadata.state_dict_metadata[key]
                metadata.planner_data[key_of(path)] = path
                results.append([replace_key(result, key_of(path)) for result in of_key])
        super().finish(metadata, results)


def replace_key(result: WriteResult, key: str) -> WriteResult:
    """The same bytes under another key."""
    return replace(result, index=MetadataIndex(key, result.index.offset, result.index.index))


def _files(items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
    held: list[WriteItem] = []
    held_bytes = 0
    for item in items:
        data = _data_of(item)
        num_bytes = math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
        if held and held_bytes + num_bytes > FILE_BYTES:
            yield held
            held, held_bytes = [], 0
        held.append(item)
        held_bytes += num_bytes
    if held:
        yield held
