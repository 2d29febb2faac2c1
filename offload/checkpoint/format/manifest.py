"""manifest.json: what a checkpoint holds, written last and believed only after every check.

Owns: the schema, its strict reading and its writing.
Does not: read tensors (reader.py) or know user data (user_data.py).
Threads: any; a manifest does not change.

    {"checksum": …,                      of the canonical JSON of "manifest": an edited one is refused
     "manifest": {
       "format": "offload-checkpoint", "version": 1, "step": …, "world_size": …,
       "files":  [{"name", "bytes", "header_checksum"}],
       "items":  [{"name", "kind", "shape", "numel", "dtype", "planes": [{"name", "dtype", "block_numel"}],
                   "step", "aliases"}],
       "pieces": [{"name", "plane", "dtype", "start", "end", "file", "checksum"}],
       "extra":  …, "rank_extra": [one for each rank]}}

On disk the state tensors of an item are its "planes", and stored ranges are "pieces": the keys of version 1.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from offload.checkpoint.format.dtypes import DTYPE_OF, NAME_OF
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError, shown
from offload.checkpoint.format.intervals import first_flaw
from offload.checkpoint.format.state import MASTER, REMAINDER, SCALES, WEIGHTS, Item, Kind, Run, StateTensor
from offload.checkpoint.format.tensor_file import FileIn, is_file_name, unique_json
from offload.kernels.dynamic_map import BLOCK_8BIT_NUMEL

FORMAT: Final = "offload-checkpoint"
VERSION: Final = 1
MAX_BYTES: Final = 1 << 30
MAX_COUNT: Final = 1 << 60

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of tensors."""

    name: str
    num_bytes: int
    header_checksum: int


@dataclass(frozen=True, slots=True)
class StoredRange:
    """One tensor in a file: a run of entries."""

    run: Run
    dtype: torch.dtype
    file: str
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint without its tensors."""

    step: int
    world_size: int
    files: tuple[StoredFile, ...]
    items: Mapping[str, Item]
    ranges: tuple[StoredRange, ...]
    extra: Any
    rank_extra: tuple[Any, ...]


# ---------------------------------------------------------------------------------------------------------- out


def to_bytes(manifest: Manifest) -> bytes:
    """The file's content. Raises CheckpointError where the parts of the ranks do not make a whole."""
    flaw = _flaw(manifest)
    if flaw is not None:
        raise CheckpointError(f"the checkpoint would not be whole: {flaw}.")
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "files": [file_fields(file) for file in manifest.files],
        "items": [item_fields(item) for item in manifest.items.values()],
        "pieces": [range_fields(stored) for stored in manifest.ranges],
        "extra": manifest.extra,
        "rank_extra": list(manifest.rank_extra),
    }
    # One range a line: people read and compare these files.
    text = json.dumps({"checksum": _checksum(body), "manifest": body}, indent=None)
    return text.replace('}, {"name": ', '},\n{"name": ').encode() + b"\n"


def file_fields(file: StoredFile) -> dict[str, Any]:
    """A file as JSON."""
    return {"name": file.name, "bytes": file.num_bytes, "header_checksum": file.header_checksum}


def item_fields(item: Item) -> dict[str, Any]:
    """An item as JSON."""
    return {
        "name": item.name,
        "kind": str(item.kind),
        "shape": list(item.shape),
        "numel": item.numel,
        "dtype": NAME_OF[item.dtype],
        "planes": [
            {"name": p.name, "dtype": NAME_OF[p.dtype], "block_numel": p.block_numel} for p in item.state_tensors
        ],
        "step": item.step,
        "aliases": list(item.aliases),
    }


def range_fields(stored: StoredRange) -> dict[str, Any]:
    """A stored range as JSON."""
    run = stored.run
    return {
        "name": run.item,
        "plane": run.state_tensor,
        "dtype": NAME_OF[stored.dtype],
        "start": run.start,
        "end": run.stop,
        "file": stored.file,
        "checksum": stored.checksum,
    }


def _checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


# ----------------------------------------------------------------------------------------------------------- in


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Raises CorruptCheckpointError naming file, field, what was expected and found."""
    with FileIn(path) as file:
        content = file.content(MAX_BYTES)
    try:
        outer = unique_json(content)
        body = outer["manifest"]
        found, expected = outer["checksum"], _checksum(body)
    except (ValueError, KeyError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path} is not a manifest: {shown(error)}.") from error
    if found != expected:
        raise CorruptCheckpointError(
            f"{path}: its checksum is {found!r}, its content has {expected}: it was damaged or edited."
        )
    manifest = _parse(Fields(body, str(path)))
    flaw = _flaw(manifest)
    if flaw is not None:
        raise CorruptCheckpointError(f"{path}: {flaw}.")
    return manifest


class Fields:
    """A JSON object whose fields are taken one by one, each with its type; knows its place for errors."""

    def __init__(self, value: Any, where: str) -> None:
        self.where = where
        self._fields = expect(value, dict, where)

    def take(self, key: str, kind: type[T]) -> T:
        """A field of exactly this type."""
        if key not in self._fields:
            raise CorruptCheckpointError(f"{self.where}: field {key!r} is missing.")
        return expect(self._fields[key], kind, f"{self.where}.{key}")

    def count(self, key: str) -> int:
        """A field that is a number of something."""
        value = self.take(key, int)
        if not 0 <= value < MAX_COUNT:
            raise CorruptCheckpointError(f"{self.where}.{key}: expected a count, found {value}.")
        return value

    def dtype(self, key: str) -> torch.dtype:
        """A field that names a dtype."""
        name = self.take(key, str)
        if name not in DTYPE_OF:
            raise CorruptCheckpointError(f"{self.where}.{key}: expected one of {', '.join(DTYPE_OF)}, found {name!r}.")
        return DTYPE_OF[name]

    def each(self, key: str) -> "Iterable[Fields]":
        """The objects of a list."""
        for index, value in enumerate(self.take(key, list)):
            yield Fields(value, f"{self.where}.{key}[{index}]")


def expect(value: Any, kind: type[T], where: str) -> T:
    """The value, of exactly this type: a bool is no int."""
    if type(value) is not kind:
        raise CorruptCheckpointError(f"{where}: expected {kind.__name__}, found {str(value)[:80]!r}.")
    return value


def parse_file(fields: Fields) -> StoredFile:
    """A file from JSON."""
    name = fields.take("name", str)
    if not is_file_name(name):
        raise CorruptCheckpointError(f"{fields.where}.name: expected a plain file name, found {name[:80]!r}.")
    return StoredFile(name, fields.count("bytes"), fields.count("header_checksum"))


def parse_item(fields: Fields) -> Item:
    """An item from JSON."""
    kind = fields.take("kind", str)
    if kind not in set(Kind):
        raise CorruptCheckpointError(f"{fields.where}.kind: expected one of {', '.join(Kind)}, found {kind[:80]!r}.")
    shape = tuple(expect(n, int, f"{fields.where}.shape") for n in fields.take("shape", list))
    if not all(0 <= n < MAX_COUNT for n in shape):
        raise CorruptCheckpointError(f"{fields.where}.shape: expected counts, found {list(shape)}.")
    state_tensors = []
    for state_tensor in fields.each("planes"):
        state_tensors.append(
            StateTensor(state_tensor.take("name", str), state_tensor.dtype("dtype"), state_tensor.count("block_numel"))
        )
    item = Item(
        name=fields.take("name", str),
        kind=Kind(kind),
        shape=shape,
        dtype=fields.dtype("dtype"),
        state_tensors=tuple(state_tensors),
        step=fields.count("step"),
        aliases=tuple(expect(name, str, f"{fields.where}.aliases") for name in fields.take("aliases", list)),
    )
    if fields.count("numel") != item.numel:
        raise CorruptCheckpointError(
            f"{fields.where}.numel: shape {list(shape)} has {item.numel} elements, found {fields.count('numel')}."
        )
    return item


def parse_range(fields: Fields) -> StoredRange:
    """A stored range from JSON."""
    run = Run(fields.take("name", str), fields.take("plane", str), fields.count("start"), fields.count("end"))
    return StoredRange(run, fields.dtype("dtype"), fields.take("file", str), fields.count("checksum"))


def _parse(body: Fields) -> Manifest:
    found = (body.take("format", str), body.take("version", int))
    if found != (FORMAT, VERSION):
        raise CorruptCheckpointError(f"{body.where}: expected format {FORMAT} version {VERSION}, found {found}.")
    listed = [parse_item(fields) for fields in body.each("items")]
    items = {item.name: item for item in listed}
    if len(items) != len(listed):
        raise CorruptCheckpointError(f"{body.where}.items: a name comes twice.")
    return Manifest(
        step=body.count("step"),
        world_size=body.count("world_size"),
        files=tuple(parse_file(fields) for fields in body.each("files")),
        items=items,
        ranges=tuple(parse_range(fields) for fields in body.each("pieces")),
        extra=body.take("extra", dict),
        rank_extra=tuple(body.take("rank_extra", list)),
    )


# ------------------------------------------------------------------------------------------------------- checks


def _flaw(manifest: Manifest) -> str | None:
    """What is wrong between the parts of a manifest, if anything."""
    names = {file.name for file in manifest.files}
    if len(names) != len(manifest.files):
        return "files: a name comes twice"
    if not 0 < manifest.world_size == len(manifest.rank_extra):
        return f"world_size is {manifest.world_size}, rank_extra has {len(manifest.rank_extra)} entries"
    for item in manifest.items.values():
        flaw = state_tensor_flaw(item)
        if flaw is not None:
            return f"item {item.name!r}: {flaw}"
    by_state_tensor: dict[tuple[str, str], list[StoredRange]] = {
        (item.name, state_tensor.name): [] for item in manifest.items.values() for state_tensor in item.state_tensors
    }
    for stored in manifest.ranges:
        found = by_state_tensor.get((stored.run.item, stored.run.state_tensor))
        if found is None:
            return f"range {stored.run}: no item has such a state tensor"
        if stored.file not in names:
            return f"range {stored.run}: its file {stored.file[:80]!r} is not listed"
        if stored.run.start >= stored.run.stop:
            return f"range {stored.run}: it is empty"
        found.append(stored)
    for (name, state_tensor_name), ranges in by_state_tensor.items():
        item = manifest.items[name]
        flaw = _coverage_flaw(item, state_tensor_name, ranges)
        if flaw is not None:
            return f"state tensor {state_tensor_name!r} of {name!r} ({item.numel} elements): {flaw}"
    return None


def state_tensor_flaw(item: Item) -> str | None:
    """What is wrong with the state tensors of an item, if anything."""
    state_tensors = {state_tensor.name: state_tensor for state_tensor in item.state_tensors}
    if len(state_tensors) != len(item.state_tensors):
        return "a state tensor comes twice"
    if item.kind is not Kind.TRAINABLE:
        legal = set(state_tensors) == {WEIGHTS} and state_tensors[WEIGHTS].block_numel == 1
        return (
            None if legal else f"a {item.kind} item has the state tensor {WEIGHTS} alone, found {sorted(state_tensors)}"
        )
    masters = {MASTER: torch.float32} if MASTER in state_tensors else {WEIGHTS: torch.bfloat16, REMAINDER: torch.uint16}
    if set(state_tensors) & {MASTER, WEIGHTS, REMAINDER} != set(masters):
        return f"a trainable item has {MASTER}, or {WEIGHTS} and {REMAINDER}; found {sorted(state_tensors)}"
    for name, dtype in masters.items():
        if (state_tensors[name].dtype, state_tensors[name].block_numel) != (dtype, 1):
            return f"state tensor {name!r}: expected {dtype}, found {state_tensors[name].dtype}"
    for state_tensor in item.state_tensors:
        if (flaw := _encoding_flaw(state_tensor, state_tensors)) is not None:
            return flaw
    return None


def _encoding_flaw(state_tensor: StateTensor, state_tensors: Mapping[str, StateTensor]) -> str | None:
    """Codes of 8 bits have their scales, these their codes; everything else has an entry for each element."""
    if not state_tensor.name.endswith(SCALES):
        if state_tensor.block_numel != 1:
            found = state_tensor.block_numel
            return f"state tensor {state_tensor.name!r}: expected an entry for each element, found one for {found}"
        if state_tensor.dtype is torch.uint8 and state_tensor.name + SCALES not in state_tensors:
            return f"state tensor {state_tensor.name!r} holds codes, but there is no {state_tensor.name + SCALES!r}"
        return None
    codes = state_tensors.get(state_tensor.name.removesuffix(SCALES))
    if codes is None or codes.dtype is not torch.uint8:
        return f"state tensor {state_tensor.name!r} holds scales, but there are no codes"
    if (state_tensor.dtype, state_tensor.block_numel) != (torch.float32, BLOCK_8BIT_NUMEL):
        expected = f"{torch.float32}, one for {BLOCK_8BIT_NUMEL} elements"
        return f"state tensor {state_tensor.name!r}: expected {expected}, found {state_tensor}"
    return None


def _coverage_flaw(item: Item, state_tensor_name: str, ranges: Sequence[StoredRange]) -> str | None:
    state_tensor = item.expect(state_tensor_name)
    if any(stored.dtype is not state_tensor.dtype for stored in ranges):
        return f"expected ranges of {state_tensor.dtype}, found {[str(stored.dtype) for stored in ranges][:4]}"
    runs = sorted((stored.run.start, stored.run.stop) for stored in ranges)
    return first_flaw([start for start, _ in runs], [stop for _, stop in runs], state_tensor.num_entries(item.numel))
