"""Import of a Hugging Face folder, or of one `safetensors` file: weights, as something that `load` reads.

Owns: finding the files, matching their names with those of a model.
Does not: hold moments: a trained parameter starts with moments of 0 and at step 0. Does not read `pytorch_model.bin`.
Threads: one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor

from offload.checkpoint.format.dtypes import bytes_of
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError, shown
from offload.checkpoint.format.export_hf import INDEX, SINGLE
from offload.checkpoint.format.open_files import OpenFiles
from offload.checkpoint.format.state import WEIGHTS, Item, Kind, Run, StateTensor
from offload.checkpoint.format.tensor_file import FileIn, TensorPlace, is_file_name, parse_header, unique_json
from offload.errors import InternalError

MAX_INDEX_BYTES: Final = 100_000_000
COMPARED_NUMEL: Final = 1024 * 1024


class HuggingFaceFolder:
    """The weights in a folder, for a model with these items. A context manager.

    A tied parameter may stand under any of its names. What the model lacks is listed too, so that `load` refuses it.
    The format has no checksums: `verify` only sees files that changed since they were opened.
    """

    def __init__(self, path: str | Path, items: Sequence[Item]) -> None:
        path = Path(path)
        self.where = str(path)
        """What is read, for errors."""
        folder, names = _find(path)
        self._files = OpenFiles(folder, follow_links=True)  # the cache of Hugging Face is made of links
        try:
            self._places = self._read_headers(names)
            self._stored_as = self._match(items)
        except BaseException:
            self.close()
            raise
        wanted = {item.name: item for item in items}
        self.items: Mapping[str, Item] = {
            name: _imported(self._places[key][1], name, wanted.get(name)) for name, key in self._stored_as.items()
        }
        """What the files hold, by the model's names."""

    def verify(self, runs: Iterable[Run]) -> None:
        """Nothing but that the files are those whose headers were read."""
        for name in dict.fromkeys(self._places[self._stored_as[run.item]][0] for run in runs):
            self._files.get(name)

    def read(self, run: Run, out: Tensor) -> None:
        """Elements of a tensor into `out`: contiguous, on the host, of the stored dtype."""
        if run.state_tensor != WEIGHTS or out.numel() != run.numel or out.dtype is not self.items[run.item].dtype:
            raise InternalError(f"{run} was asked for as {out.numel()} entries of {out.dtype}.")
        self._read(self._stored_as[run.item], run.start, out)

    def close(self) -> None:
        """Close the files. Idempotent."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, key: str, start: int, out: Tensor) -> None:
        name, place = self._places[key]
        self._files.get(name).read(bytes_of(out), place.offset + start * place.dtype.itemsize)

    def _read_headers(self, names: Mapping[str, set[str] | None]) -> dict[str, tuple[str, TensorPlace]]:
        """Tensors by key; `names`: the keys that the index expects in each file, None without an index."""
        places: dict[str, tuple[str, TensorPlace]] = {}
        for name, expected in names.items():
            file = self._files.get(name)
            found = parse_header(file.header(), file.path, file.num_bytes)
            if expected is not None and expected != found.keys():
                key = min(expected ^ found.keys())
                raise CorruptCheckpointError(f"{file.path} and {INDEX} disagree about {key!r}.")
            places |= {key: (name, place) for key, place in found.items()}
        return places

    def _match(self, items: Sequence[Item]) -> dict[str, str]:
        """The key in the files for each name of the model, then what the model does not know."""
        stored: dict[str, str] = {}
        used: set[str] = set()
        for item in items:
            keys = [key for key in (item.name, *item.aliases) if key in self._places]
            for other in keys[1:]:
                self._check_same(keys[0], other)
            if keys:
                stored[item.name] = keys[0]
                used |= set(keys)
        return stored | {key: key for key in self._places if key not in used}

    def _check_same(self, first: str, second: str) -> None:
        """Both names of a tied parameter are stored: they must have the same values."""
        place, other = self._places[first][1], self._places[second][1]
        same = (place.dtype, place.shape) == (other.dtype, other.shape)
        numel = place.num_bytes // place.dtype.itemsize
        for start in range(0, numel if same else 0, COMPARED_NUMEL):
            parts = torch.empty(2, min(COMPARED_NUMEL, numel - start), dtype=place.dtype)
            self._read(first, start, parts[0])
            self._read(second, start, parts[1])
            same = same and bytes_of(parts[0]) == bytes_of(parts[1])
        if not same:
            raise CheckpointError(f"{self.where}: {first!r} and {second!r} differ, but the model ties them to one.")


def _imported(place: TensorPlace, name: str, wanted: Item | None) -> Item:
    item = Item(
        name=name,
        kind=Kind.FROZEN,
        shape=place.shape,
        dtype=place.dtype,
        state_tensors=(StateTensor(WEIGHTS, place.dtype),),
    )
    if wanted is None:
        return item
    kind = Kind.BUFFER if wanted.kind is Kind.BUFFER else Kind.FROZEN
    return replace(item, kind=kind, aliases=wanted.aliases)


def _find(path: Path) -> tuple[Path, Mapping[str, set[str] | None]]:
    """The folder, and its files with the keys that they should have."""
    if path.suffix == ".safetensors":
        return path.parent, {path.name: None}
    if (path / INDEX).exists():
        with FileIn(path / INDEX, follow_links=True) as file:
            content = file.content(MAX_INDEX_BYTES)
        try:
            weight_map = unique_json(content)["weight_map"]
            names: dict[str, set[str] | None] = {name: set() for name in weight_map.values()}
            wrong = [name for name in names if not is_file_name(name)]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptCheckpointError(f"{path / INDEX} is not an index: {shown(error)}.") from error
        if wrong:
            raise CorruptCheckpointError(f"{path / INDEX} names {wrong[0]!r:.80}: expected a plain file name.")
        for key, name in weight_map.items():
            names.setdefault(name, set()).add(key)  # type: ignore[union-attr]
        return path, names
    if (path / SINGLE).exists():
        return path, {SINGLE: None}
    raise CheckpointError(
        f"{path} holds neither {SINGLE} nor {INDEX}. Other formats are not read: open it with transformers and "
        "save_pretrained(…) it first."
    )
