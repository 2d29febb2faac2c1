"""Import of a `torch.distributed.checkpoint`: weights and, where they are there, moments and steps.

Owns: reading its metadata without letting it run anything, matching its keys with a model, assembling runs from chunks.
Does not: read extensions (compressed streams), or the bytes of other objects, such as groups of hyper-parameters.
Threads: one.

Note [Pickled metadata]: this format's metadata is a pickle, and a pickle can call anything. Here it can name the
classes of that format and nothing else; tensors are read with `weights_only=True`.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from offload.checkpoint.format.dcp_names import METADATA, STEP, key_of, state_path, weight_path
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.open_files import OpenFiles
from offload.checkpoint.format.state import MASTER, REMAINDER, SCALES, WEIGHTS, Item, Kind, Run, StateTensor
from offload.checkpoint.format.tensor_file import FileIn
from offload.errors import InternalError

MAX_METADATA_BYTES: Final = 1 << 30
MAX_CACHED: Final = 3
"""Chunks in memory: a sink asks for a master and two moments in turn."""


def _as_text(*parts: str) -> str:
    """Instead of a path: where the checkpoint was written does not matter."""
    return "/".join(parts)


ALLOWED: Final[Mapping[tuple[str, str], Any]] = {
    **{
        (kind.__module__, kind.__name__): kind
        for kind in (
            metadata.Metadata,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
        )
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    **dict.fromkeys(product(("pathlib", "pathlib._local"), ("PosixPath", "WindowsPath")), _as_text),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no such metadata needs")
        return ALLOWED[module, name]


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class DistributedCheckpoint:
    """The state in a folder, for a model with these items. A context manager.

    A parameter with all its moments comes back as trained, another one as weights alone. Memory: MAX_CACHED chunks,
    which are as long as whoever wrote them made them. The format has no checksums.
    """

    def __init__(self, path: str | Path, items: Sequence[Item]) -> None:
        folder = Path(path)
        self.where = str(folder)
        """What is read, for errors."""
        self._stored = _read_metadata(folder / METADATA)
        self._files = OpenFiles(folder)
        self._cache: OrderedDict[_Chunk, Tensor] = OrderedDict()
        self._of: dict[tuple[str, str], _Stored] = {}
        self.items: Mapping[str, Item] = {}
        """What is stored, by the model's names."""
        try:
            self.items = self._match(items)
        except BaseException:
            self.close()
            raise

    def verify(self, runs: Iterable[Run]) -> None:
        """That all files are there and long enough."""
        for run in runs:
            for chunk in self._of[run.item, run.state_tensor].chunks:
                self._check_place(chunk)

    def read(self, run: Run, out: Tensor) -> None:
        """Elements of a tensor into `out`: contiguous, on the host, of the state tensor's dtype."""
        state_tensor = self.items[run.item].state_tensor(run.state_tensor)
        if state_tensor is None or out.numel() != run.numel or out.dtype is not state_tensor.dtype:
            raise InternalError(
                f"{run} was asked for as {out.numel()} entries of {out.dtype}; stored is {state_tensor}."
            )
        stored = self._of[run.item, run.state_tensor]
        shape = stored.shape or (1,)
        row_numel = max(math.prod(shape[1:]), 1)
        first, last = run.start // row_numel, -(-run.stop // row_numel)
        rows = torch.empty((last - first, *shape[1:]), dtype=stored.dtype)
        for chunk in stored.chunks:
            offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
            top, bottom = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if top >= bottom or not math.prod(sizes):
                continue
            values = self._values(stored, chunk).view(sizes)
            box = tuple(slice(start, start + size) for start, size in zip(offsets[1:], sizes[1:], strict=True))
            rows[(slice(top - first, bottom - first), *box)] = values[top - offsets[0] : bottom - offsets[0]]
        start = run.start - first * row_numel
        out.copy_(rows.view(-1)[start : start + run.numel])

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._cache.clear()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- matching

    def _match(self, items: Sequence[Item]) -> dict[str, Item]:
        """Items by the model's names, then weights that the model does not know."""
        found: dict[str, Item] = {}
        used: set[str] = set()
        for item in items:
            names = (item.name, *item.aliases)
            keys = [key for name in names for key in (key_of(weight_path(name)), name) if key in self._stored]
            if keys:
                used |= set(keys)
                found[item.name] = self._item(item, self._stored[keys[0]])
        prefix = key_of(weight_path(""))
        for key, stored in self._stored.items():
            if key.startswith(prefix) and key not in used:
                found[key] = Item(
                    name=key,
                    kind=Kind.FROZEN,
                    shape=stored.shape,
                    dtype=stored.dtype,
                    state_tensors=(StateTensor(WEIGHTS, stored.dtype),),
                )
        return found

    def _item(self, wanted: Item, weights: _Stored) -> Item:
        names = [
            state_tensor.name
            for state_tensor in wanted.state_tensors
            if state_tensor.name not in (MASTER, WEIGHTS, REMAINDER) and not state_tensor.name.endswith(SCALES)
        ]
        keys = {name: key_of(state_path(wanted.name, name)) for name in names}
        moments = {name: self._stored[key] for name, key in keys.items() if key in self._stored}
        step = self._stored.get(key_of(state_path(wanted.name, STEP)))
        kind, state_tensors, num_steps = wanted.kind, [StateTensor(WEIGHTS, weights.dtype)], 0
        if wanted.kind is not Kind.TRAINABLE or step is None or len(moments) < len(names):
            kind = Kind.BUFFER if wanted.kind is Kind.BUFFER else Kind.FROZEN
            self._of[wanted.name, WEIGHTS] = weights
        else:
            state_tensors, num_steps = [StateTensor(MASTER, torch.float32)], self._step(step)
            self._of[wanted.name, MASTER] = weights
            for name, moment in moments.items():
                if moment.shape != weights.shape:
                    raise CorruptCheckpointError(
                        f"{self.where}: {moment.key!r} has shape {list(moment.shape)}, its parameter "
                        f"{list(weights.shape)}."
                    )
                state_tensors.append(StateTensor(name, torch.float32))
                self._of[wanted.name, name] = moment
        return Item(
            name=wanted.name,
            kind=kind,
            shape=weights.shape,
            dtype=weights.dtype,
            state_tensors=tuple(state_tensors),
            step=num_steps,
            aliases=wanted.aliases,
        )

    def _step(self, stored: _Stored) -> int:
        value = self._values(stored, stored.chunks[0]) if math.prod(stored.shape) == 1 else None
        if value is None or not math.isfinite(step := float(value)) or step != int(step) or step < 0:
            raise CorruptCheckpointError(f"{self.where}: {stored.key!r} is no count of steps.")
        return int(step)

    # --------------------------------------------------------------------------------------------------- chunks

    def _check_place(self, chunk: _Chunk) -> FileIn:
        file = self._files.get(chunk.file)
        if chunk.start + chunk.num_bytes > file.num_bytes:
            raise CorruptCheckpointError(
                f"{file.path} has {file.num_bytes} bytes; a tensor should be at {chunk.start}, of {chunk.num_bytes}."
            )
        return file

    def _values(self, stored: _Stored, chunk: _Chunk) -> Tensor:
        values = self._cache.pop(chunk, None)
        if values is None:
            file = self._check_place(chunk)
            content = bytearray(chunk.num_bytes)
            file.read(memoryview(content), chunk.start)
            try:
                values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            except Exception as error:  # whatever a damaged archive makes torch raise
                raise CorruptCheckpointError(f"{file.path}: {stored.key!r} cannot be read: {error}") from error
            if not isinstance(values, Tensor) or (tuple(values.shape), values.dtype) != (chunk.sizes, stored.dtype):
                raise CorruptCheckpointError(f"{file.path}: {stored.key!r} is not the tensor that {METADATA} lists.")
            values = values.contiguous()
            while len(self._cache) >= MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache[chunk] = values
        return values


def _read_metadata(path: Path) -> dict[str, _Stored]:
    """All tensors by key."""
    if not path.exists():
        raise CheckpointError(f"{path.parent} holds no {METADATA}, so it is no torch.distributed.checkpoint.")
    with FileIn(path) as file:
        content = file.content(MAX_METADATA_BYTES)
    try:
        found = _Unpickler(io.BytesIO(content)).load()
        listed = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in found.storage_data.items()
            if not getattr(info, "transform_descriptors", None)
        }
        return {
            key: _stored(key, tensor, listed)
            for key, tensor in found.state_dict_metadata.items()
            if isinstance(tensor, metadata.TensorStorageMetadata)
        }
    except Exception as error:  # whatever a damaged pickle makes Python raise
        raise CorruptCheckpointError(f"{path} is not metadata that can be used: {error}") from error


def _stored(key: str, tensor: metadata.TensorStorageMetadata, listed: Mapping[tuple[str, Any], Any]) -> _Stored:
    shape = tuple(int(n) for n in tensor.size)
    chunks = []
    for each in tensor.chunks:
        offsets, sizes = tuple(int(n) for n in each.offsets), tuple(int(n) for n in each.sizes)
        info = listed[key, offsets]
        name, start, num_bytes = str(info.relative_path), int(info.offset), int(info.length)
        if name in ("", ".", "..") or Path(name).name != name or min(start, num_bytes) < 0:
            raise ValueError(f"{key!r} is said to be in {name!r}, which is no plain file name")
        chunks.append(_Chunk(offsets, sizes, name, start, num_bytes))
    _check_cover(key, shape, chunks)
    return _Stored(key, shape, tensor.properties.dtype, tuple(chunks))


def _check_cover(key: str, shape: tuple[int, ...], chunks: Sequence[_Chunk]) -> None:
    """Boxes inside the tensor that do not overlap and together have its volume: they are the tensor."""
    for chunk in chunks:
        box = zip(shape, chunk.offsets, chunk.sizes, strict=True)
        if not all(min(offset, size) >= 0 and offset + size <= length for length, offset, size in box):
            raise ValueError(f"{key!r} has a chunk outside of its shape {list(shape)}")
    for first, second in _beside_each_other(sorted(chunks, key=lambda chunk: chunk.offsets)):
        bounds = zip(first.offsets, first.sizes, second.offsets, second.sizes, strict=True)
        if all(max(a, b) < min(a + m, b + n) for a, m, b, n in bounds):
            raise ValueError(f"{key!r} has two chunks of the same elements")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{key!r} has chunks that do not make up its shape {list(shape)}")


def _beside_each_other(ordered: Sequence[_Chunk]) -> Iterator[tuple[_Chunk, _Chunk]]:
    """Pairs that share rows: all pairs of a large job's chunks would be too many. `ordered` by their first row."""
    for number, first in enumerate(ordered):
        for other in range(number + 1, len(ordered)):
            if first.offsets and ordered[other].offsets[0] >= first.offsets[0] + first.sizes[0]:
                break
            yield first, ordered[other]
