"""Export to the folder of `safetensors` files that Hugging Face's `from_pretrained` opens.

Owns: names and sizes of the files, the index, what is said about tied parameters.
Does not: write config.json or a tokenizer: `model.config.save_pretrained(folder)` does, before or after.
Threads: one.

A tied parameter is written once, under its first name, as `save_pretrained` does; the metadata of its file gives for
each other name this one, as `safetensors.torch.save_model` does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from offload.checkpoint.format.dtypes import bytes_of, name_of
from offload.checkpoint.format.errors import CheckpointError
from offload.checkpoint.format.folder import write_synced
from offload.checkpoint.format.plain import PlainTensors
from offload.checkpoint.format.staging import staged
from offload.checkpoint.format.state import Item, StateReader
from offload.checkpoint.format.tensor_file import FileOut, lay_out
from offload.errors import ConfigError

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
SHARD_BYTES: Final = 5_000_000_000
"""Bytes of tensors in one file, as `save_pretrained` had it for years: servers and tools expect no longer files."""

TAKEN: Final = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True)
class Exported:
    """A model in another format."""

    folder: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    """Of the tensors."""


def export_hf(
    reader: StateReader, out: Path, *, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Write the weights of an open checkpoint to `out`, in the memory of one chunk. `dtype`: see PlainTensors."""
    if shard_bytes < 1:
        raise ConfigError(f"shard_bytes={shard_bytes}: expected a number of bytes.")
    plain = PlainTensors(reader, dtype)
    shards = _shards(list(plain.weights.values()), shard_bytes)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    with staged(out, taken=TAKEN, last=INDEX) as folder:
        for name, items in zip(names, shards, strict=True):
            _write_shard(folder / name, items, plain)
        total_bytes = sum(map(_num_bytes, plain.weights.values()))
        if len(shards) > 1:
            weight_map = {item.name: name for name, items in zip(names, shards, strict=True) for item in items}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            write_synced(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
            names.append(INDEX)
    return Exported(out, tuple(names), len(plain.weights), total_bytes)


def _shards(items: Sequence[Item], shard_bytes: int) -> list[list[Item]]:
    """In order, a new file where one would become too long; at least one file."""
    shards: list[list[Item]] = [[]]
    room_bytes = shard_bytes
    for item in items:
        name_of(item.dtype, of=repr(item.name))
        if item.name == "__metadata__":
            raise CheckpointError("a parameter called __metadata__ cannot be exported: safetensors uses the name.")
        if shards[-1] and _num_bytes(item) > room_bytes:
            shards.append([])
            room_bytes = shard_bytes
        room_bytes -= _num_bytes(item)
        shards[-1].append(item)
    return shards


def _num_bytes(item: Item) -> int:
    return item.numel * item.dtype.itemsize


def _write_shard(path: Path, items: Sequence[Item], plain: PlainTensors) -> None:
    tied = {alias: item.name for item in items for alias in item.aliases}
    layout = lay_out([(item.name, item.dtype, item.shape) for item in items], {**tied, "format": "pt"})
    file = FileOut(path, layout)
    try:
        for place in layout.places:
            for start, values in plain.chunks(place.key):
                file.write(bytes_of(values), place.offset + start * place.dtype.itemsize)
        file.finish()
    finally:
        file.close()
