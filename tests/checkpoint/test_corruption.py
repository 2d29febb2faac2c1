"""Damaged, shortened, edited and hostile checkpoints: refused by the name of the file, and never half used.

The damage is drawn from a seed. Each case takes one way; what a way does to which byte is random.
"""

import ast
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload.checkpoint.format import manifest as manifests
from offload.checkpoint.format.errors import CheckpointError, CorruptCheckpointError
from offload.checkpoint.format.load import load
from offload.checkpoint.format.reader import Checkpoint
from tests.checkpoint.damage import STEP, WAYS, Case
from tests.checkpoint.memory import Sink, State, frozen, random_state, save, small_model, trainable

EXTRA = {"epoch": 3, "losses": torch.arange(5.0), "name": "run", "nested": [1, (2, None)]}


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
    # chunks may swap what is equal, or a header be given the shape that it has.
    assert set(accepted) <= {"flip_bytes", "cut_short", "lengthen", "swap_two_chunks", "edit_a_header"}
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


def copied(good: tuple[Path, State], tmp_path: Path) -> Case:
    shutil.copytree(good[0], tmp_path / "root")
    return Case(tmp_path / "root", np.random.default_rng(0))


@pytest.mark.parametrize(("table", "index"), [(None, None), ("items", 0)])
def test_an_edited_step_or_user_data_is_seen_by_the_checksum(
    good: tuple[Path, State], tmp_path: Path, table: str | None, index: int | None
) -> None:
    """Nothing else contradicts them."""
    case = copied(good, tmp_path)
    case.edit(lambda body: (body[table][index] if table else body).update(step=4), seal=False)
    error = refusal(case.root, good[1])
    assert isinstance(error, CorruptCheckpointError)
    assert f"{case.manifest}: its checksum is" in str(error)


def test_a_tensor_that_the_manifest_does_not_list_is_refused(good: tuple[Path, State], tmp_path: Path) -> None:
    case = copied(good, tmp_path)

    def forget_user_data(body: dict[str, Any]) -> None:
        for table in ("items", "pieces"):
            body[table] = [entry for entry in body[table] if not entry["name"].startswith(".extra.user")]
        body["extra"] = {}

    case.edit(forget_user_data, seal=True)
    error = refusal(case.root, good[1])
    assert re.search(
        r"\.safetensors: it holds 'weights/\.extra\.user\.0.*', which the manifest does not list", str(error)
    )


@pytest.mark.parametrize(
    ("state_tensor", "change"),
    [
        ("exp_avg_scale", {"block_numel": 512}),
        ("exp_avg_scale", {"block_numel": 0}),
        ("exp_avg", {"block_numel": 2}),
        ("exp_avg", {"name": "other"}),
    ],
)
def test_an_encoding_that_there_is_not_is_refused_though_its_sizes_fit(
    tmp_path: Path, rng: np.random.Generator, state_tensor: str, change: dict[str, Any]
) -> None:
    """One element has one scale, whatever the block."""
    state = random_state([trainable("w", (1,), moments="8bit")], rng)
    saved = save(tmp_path, state)

    def edit(body: dict[str, Any]) -> None:
        next(p for p in body["items"][0]["planes"] if p["name"] == state_tensor).update(change)
        for chunk in body["pieces"]:
            if chunk["plane"] == state_tensor:
                chunk["plane"] = change.get("name", state_tensor)

    Case(tmp_path, rng).edit(edit, seal=True)
    with pytest.raises(CorruptCheckpointError, match=rf"{saved.folder / 'manifest.json'}: item 'w': state tensor"):
        Checkpoint(tmp_path)


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
