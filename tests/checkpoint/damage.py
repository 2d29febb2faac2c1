"""Ways to damage a checkpoint, each drawn from a generator: what `test_corruption.py` does to copies of a good one."""

import copy
import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEP = "step-00000003"


@dataclass
class Case:
    """A copy of a good checkpoint, to be damaged."""

    root: Path
    rng: np.random.Generator

    @property
    def manifest(self) -> Path:
        return self.root / STEP / "manifest.json"

    def any_file(self) -> Path:
        return self._one_of([self.root / "latest", self.manifest, *self.tensor_files()])

    def tensor_files(self) -> list[Path]:
        return sorted((self.root / STEP).glob("*.safetensors"))

    def tensor_file(self) -> Path:
        return self._one_of(self.tensor_files())

    def choose(self, *options: Any) -> Any:
        return self._one_of(options)

    def _one_of(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def edit(self, change: Callable[[dict[str, Any]], None], *, seal: bool) -> None:
        """Edit the manifest; sealed, its checksum is right again."""
        outer = json.loads(self.manifest.read_text())
        change(outer["manifest"])
        if seal:
            text = json.dumps(outer["manifest"], sort_keys=True, separators=(",", ":"))
            outer["checksum"] = zlib.crc32(text.encode())
        self.manifest.write_text(json.dumps(outer))


# ------------------------------------------------------------------------------------------------ ways of damage


def flip_bytes(case: Case) -> None:
    path = case.any_file()
    content = bytearray(path.read_bytes())
    for at in case.rng.integers(len(content), size=case.choose(1, 1, 2, 9)):
        content[at] ^= int(case.rng.integers(1, 256))
    path.write_bytes(content)


def cut_short(case: Case) -> None:
    path = case.any_file()
    os.truncate(path, int(case.rng.integers(path.stat().st_size)))


def lengthen(case: Case) -> None:
    with case.any_file().open("ab") as file:
        file.write(case.rng.bytes(case.choose(1, 8, 4096)))


def remove_a_file(case: Case) -> None:
    case.choose(case.manifest, *case.tensor_files()).unlink()


def put_something_else_there(case: Case) -> None:
    """A link to the same bytes outside, a folder, a pipe: opening it must neither follow nor hang."""
    path = case.any_file()
    outside = case.root.parent / "outside"
    outside.mkdir(exist_ok=True)
    shutil.move(path, outside / path.name)
    case.choose(
        lambda: path.symlink_to(outside / path.name),
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.write_bytes(b""),
        lambda: path.symlink_to("/dev/zero"),
    )()


def link_the_folder_outside(case: Case) -> None:
    outside = case.root.parent / "elsewhere"
    shutil.move(case.root / STEP, outside)
    (case.root / STEP).symlink_to(outside)


def point_latest_elsewhere(case: Case) -> None:
    outside = case.root.parent / STEP
    shutil.copytree(case.root / STEP, outside)
    name = case.choose(f"../{STEP}", str(outside), f"./{STEP}", "..", "", "step-00000009", STEP + "\0", "step-3", "é")
    (case.root / "latest").write_text(name)


def swap_two_files(case: Case) -> None:
    first, second = case.rng.permutation(len(case.tensor_files()))[:2]
    paths = case.tensor_files()
    contents = paths[first].read_bytes(), paths[second].read_bytes()
    paths[first].write_bytes(contents[1])
    paths[second].write_bytes(contents[0])


def edit_without_the_checksum(case: Case) -> None:
    case.edit(lambda body: change_a_leaf(case, body), seal=False)


def edit_with_the_checksum(case: Case) -> None:
    """Only what the tensors contradict: whoever computes checksums can write another step or user data."""
    case.edit(lambda body: change_a_leaf(case, body), seal=True)


def drop_or_repeat_an_entry(case: Case) -> None:
    def change(body: dict[str, Any]) -> None:
        entries = body[case.choose("files", "items", "pieces")]
        at = int(case.rng.integers(len(entries)))
        case.choose(lambda: entries.pop(at), lambda: entries.append(copy.deepcopy(entries[at])))()

    case.edit(change, seal=True)


def swap_two_chunks(case: Case) -> None:
    """Both say that the other one's bytes are theirs."""

    def change(body: dict[str, Any]) -> None:
        first, second = (body["pieces"][at] for at in case.rng.permutation(len(body["pieces"]))[:2])
        for key in case.choose(("name",), ("plane",), ("start", "end"), ("name", "plane", "dtype", "start", "end")):
            first[key], second[key] = second[key], first[key]

    case.edit(change, seal=True)


def lead_outside(case: Case) -> None:
    name = case.tensor_file().name
    shutil.copy(case.root / STEP / name, case.root.parent / name)
    other = case.choose(
        f"../../{name}", str(case.root.parent / name), f"./{name}", f"x/../{name}", "/etc/passwd", "", ".", "..",
        f"{name}\0", f"..\\{name}", f"%2e%2e/{name}", "manifest.json", "latest", ".hidden.safetensors", "a" * 300,
    )  # fmt: skip

    def change(body: dict[str, Any]) -> None:
        for key, entries in (("name", body["files"]), ("file", body["pieces"])):
            for entry in entries:
                if entry[key] == name:
                    entry[key] = other

    case.edit(change, seal=True)


def edit_a_header(case: Case) -> None:
    """Header and its checksum agree; the header no longer says what the manifest does, or not what it must."""
    path = case.tensor_file()
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + length])
    key = case.choose(*(key for key in fields if key != "__metadata__"))
    start, stop = fields[key]["data_offsets"]
    change = case.choose(
        {"dtype": "I64"}, {"dtype": "Q7"}, {"shape": [1]}, {"shape": [-1, -1]}, {"shape": "x"}, {"shape": [2**70]},
        {"data_offsets": [start + 1, stop + 1]}, {"data_offsets": [-8, stop]}, {"data_offsets": [0]},
        None, "other name",
    )  # fmt: skip
    if isinstance(change, dict):
        fields[key] |= change
    else:
        fields[f"{key}x" if change else "extra"] = fields.pop(key)
    text = json.dumps(fields).encode()
    header = len(text).to_bytes(8, "little") + text
    path.write_bytes(header + content[8 + length :])

    def seal(body: dict[str, Any]) -> None:
        entry = next(file for file in body["files"] if file["name"] == path.name)
        entry |= {"bytes": path.stat().st_size, "header_checksum": zlib.crc32(header)}

    case.edit(seal, seal=True)


def write_no_json(case: Case) -> None:
    good = case.manifest.read_text()
    case.manifest.write_text(
        case.choose("", "null", "[]", "{}", '{"manifest": {}, "checksum": 0}', "[" * 100_000, good + good,
                    "\ufeff" + good, good.replace('"step"', '"step": 1, "step"', 1), good.replace("0", "NaN", 1),
                    "9" * 5000)
    )  # fmt: skip


WAYS = (
    flip_bytes, flip_bytes, flip_bytes, cut_short, lengthen, remove_a_file, put_something_else_there,
    link_the_folder_outside, point_latest_elsewhere, swap_two_files, edit_without_the_checksum, edit_with_the_checksum,
    edit_with_the_checksum, drop_or_repeat_an_entry, swap_two_chunks, lead_outside, edit_a_header, write_no_json,
)  # fmt: skip

LEAVES = {
    "files": ("name", "bytes", "header_checksum"),
    "items": ("name", "kind", "shape", "numel", "planes"),
    "pieces": ("name", "plane", "dtype", "start", "end", "file", "checksum"),
    "": ("format", "version", "world_size", "files", "items", "pieces"),
}


def change_a_leaf(case: Case, body: dict[str, Any]) -> None:
    """Another value, of this type or another, in a field that says where or what values are."""
    table = case.choose("files", "items", "items", "pieces", "pieces", "")
    holder = body if not table else body[table][int(case.rng.integers(len(body[table])))]
    key = case.choose(*LEAVES[table])
    if key == "planes" and case.choose(True, False):
        holder = holder[key][int(case.rng.integers(len(holder[key])))]
        key = case.choose("name", "dtype", "block_numel")
    old = holder[key]
    if type(old) is int:
        others = (old + 1, old - 1, 2 * old + 1, -1, 1 << 62, 1 << 80, float(old), str(old), None, True, [old])
    elif type(old) is str:
        others = (f"{old}x", "", "F32", "U8", "weights", "master", "frozen", "buffer", "extra", 0, None, [old], {})
    else:
        others = ([*old, 1], old[1:] if old else [0], old[::-1], None, {}, "x", [None])
    # an entry that merely stands elsewhere says the same
    same = [old, old[::-1]] if key in ("planes", "files", "items", "pieces") else [old]
    holder[key] = case.choose(*(value for value in others if type(value) is not type(old) or value not in same))
