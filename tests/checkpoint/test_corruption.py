"""Damaged, shortened, edited and hostile checkpoints: refused by the name of the file, and never half used.

The damage is drawn from a seed. Each case names one way; what a way does to which byte is random.
"""

import ast
import copy
import json
import os
import pickle
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload.checkpoint import manifest as manifests
from offload.checkpoint.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.load import load
from offload.checkpoint.reader import Checkpoint
from tests.checkpoint.memory import Sink, State, frozen, random_state, save, small_model

STEP = "step-00000003"
EXTRA = {"epoch": 3, "losses": torch.arange(5.0), "name": "run", "nested": [1, (2, None)]}


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


def swap_two_pieces(case: Case) -> None:
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
    edit_with_the_checksum, drop_or_repeat_an_entry, swap_two_pieces, lead_outside, edit_a_header, write_no_json,
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


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    root = tmp_path_factory.mktemp("good") / "root"
    state = random_state(small_model(split=True, moments="8bit"), np.random.default_rng(0))
    save(root, state, extra=EXTRA, rank_extra={"seed": torch.arange(3)}, file_bytes=3000)
    return root, state


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever unpickles a file fails the test, but for numba, which keeps compiled kernels so."""
    real = pickle.load

    def refuse(file: Any, *_: object, **__: object) -> Any:
        if Path(getattr(file, "name", "")).suffix == ".nbi":
            return real(file)
        return pytest.fail(f"{file} was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)


def refusal(root: Path, state: State) -> CheckpointError | None:
    """The error of a load; None where it gave all that was saved. A sink is written to only if all is well."""
    sink = Sink(state.items)
    try:
        with Checkpoint(root) as checkpoint:
            extra, own = checkpoint.extra(), checkpoint.rank_extra(0)
            load(checkpoint, sink)
    except CheckpointError as error:
        assert sink.num_writes == 0
        return error
    assert sink.state.same_bits(state)
    assert sink.steps == {item.name: item.step for item in state.items if item.kind == "trainable"}
    assert (extra.pop("losses").tolist(), own["seed"].tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2])
    assert extra == {key: value for key, value in EXTRA.items() if key != "losses"}
    return None


def fuzz(good: tuple[Path, State], tmp_path: Path, seed: int, num_cases: int) -> None:
    root, state = good
    accepted: Counter[str] = Counter()
    for number in range(num_cases):
        way = WAYS[number % len(WAYS)]
        folder = tmp_path / str(number)
        shutil.copytree(root, folder / "root")
        way(Case(folder / "root", np.random.default_rng([seed, number])))
        try:
            error = refusal(folder / "root", state)
        except BaseException as error:
            error.add_note(f"{way.__name__}, case {number} of seed {seed}, in {folder}")
            raise
        if error is None:
            accepted[way.__name__] += 1
        else:
            assert str(folder / "root") in str(error), f"{way.__name__}, case {number}, names no file: {error}"
        shutil.rmtree(folder)
    # What the values do not depend on may be damaged, as the white space of the manifest and of `latest`; and two
    # pieces may swap what is equal, or a header be given the shape that it has.
    assert set(accepted) <= {"flip_bytes", "cut_short", "lengthen", "swap_two_pieces", "edit_a_header"}
    assert accepted.total() <= num_cases // 20


@pytest.mark.usefixtures("no_pickle")
def test_two_hundred_fuzzed_checkpoints_are_refused_by_name(
    good: tuple[Path, State], tmp_path: Path, seed: int
) -> None:
    fuzz(good, tmp_path, seed, 200)


@pytest.mark.stress
@pytest.mark.usefixtures("no_pickle")
def test_a_thousand_fuzzed_checkpoints_are_refused_by_name(good: tuple[Path, State], tmp_path: Path, seed: int) -> None:
    fuzz(good, tmp_path, seed, 1000)


def test_every_single_byte_of_a_tensor_file_matters(tmp_path: Path, rng: np.random.Generator) -> None:
    saved = save(tmp_path, random_state([frozen("f", (9,))], rng))
    path = saved.folder / "rank-00000-00001.safetensors"
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CorruptCheckpointError, match=str(path)), Checkpoint(tmp_path) as checkpoint:
            checkpoint.verify()


def test_a_file_that_changes_between_the_check_and_the_use_is_refused(good: tuple[Path, State], tmp_path: Path) -> None:
    """Scenario: every byte was verified, then another process rewrites a file in place while the load goes on."""
    shutil.copytree(good[0], tmp_path / "root")
    sink = Sink(good[1].items)
    with Checkpoint(tmp_path / "root") as checkpoint:
        checkpoint.verify()
        for path in (tmp_path / "root" / STEP).glob("*.safetensors"):
            content = path.read_bytes()
            path.write_bytes(content[:-1] + b"\xff")
            os.utime(path, ns=(1, 1))
        with pytest.raises(CorruptCheckpointError, match="was changed while it was being read"):
            load(checkpoint, sink)
    assert sink.num_writes == 0


def test_an_older_checkpoint_is_named_where_the_latest_cannot_be_found(
    good: tuple[Path, State], tmp_path: Path
) -> None:
    shutil.copytree(good[0], tmp_path / "root")
    (tmp_path / "root" / "latest").write_text("step-00000007\n")
    with pytest.raises(CorruptCheckpointError, match=f"give one of these instead: {STEP}"):
        Checkpoint(tmp_path / "root")


def test_without_latest_the_newest_complete_checkpoint_is_taken(good: tuple[Path, State], tmp_path: Path) -> None:
    shutil.copytree(good[0], tmp_path / "root")
    (tmp_path / "root" / "latest").unlink()
    assert refusal(tmp_path / "root", good[1]) is None


def test_user_data_that_the_manifest_does_not_explain_is_refused(good: tuple[Path, State], tmp_path: Path) -> None:
    shutil.copytree(good[0], tmp_path / "root")
    case = Case(tmp_path / "root", np.random.default_rng(0))
    for coded in ({"$tensor": 99}, {"$tensor": "0"}, {"$pickle": "gASVAAAA"}, {"$float": "1"}, {"$pairs": ["set", []]}):
        case.edit(lambda body, coded=coded: body.update(extra={"x": coded}), seal=True)
        with (
            Checkpoint(tmp_path / "root") as checkpoint,
            pytest.raises(CorruptCheckpointError, match=r"manifest\.json"),
        ):
            checkpoint.extra()


def test_a_manifest_longer_than_any_is_not_read(
    good: tuple[Path, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "MAX_BYTES", 100)
    with pytest.raises(CorruptCheckpointError, match="at most 100 were expected"):
        Checkpoint(good[0])


def test_only_the_import_of_a_format_that_is_pickled_names_pickle() -> None:
    modules = Path(manifests.__file__).parent.glob("*.py")
    assert {path.name for path in modules if {"pickle", "torch.load"} & words(path)} <= {"import_dcp.py"}


def words(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return names | {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_a_folder_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=f"{path} holds no checkpoint"):
            Checkpoint(path)
