"""What an installation brings: one top-level package, a script, and the names users may rely on."""

import importlib.metadata
import importlib.util
import tomllib
from pathlib import Path

import pytest

import offload
from tests.architecture.source import ROOT, Module, imports, modules

PUBLIC_NAMES = {"optim", "Session", "close_all", "deferred_init", "enable", "errors"}


def test_the_public_names_are_these() -> None:
    assert set(offload.__all__) == PUBLIC_NAMES
    assert all(hasattr(offload, name) for name in PUBLIC_NAMES)


def test_no_regular_package_kernels_is_installed_by_us() -> None:
    spec = importlib.util.find_spec("kernels")
    # A namespace (a checkout on sys.path) has no origin and gives way to any regular package of that name.
    assert spec is None or spec.origin is None or not Path(spec.origin).resolve().is_relative_to(ROOT)


def test_the_distribution_holds_one_top_level_package() -> None:
    include = pyproject()["tool"]["setuptools"]["packages"]["find"]["include"]
    assert include == ["offload", "offload.*"]
    for distribution in importlib.metadata.distributions(name="offload-runtime"):
        tops = {Path(str(file)).parts[0] for file in distribution.files or ()}
        assert "kernels" not in tops


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)
def test_the_package_imports_nothing_that_only_a_checkout_has(module: Module) -> None:
    outside = {"benchmarks", "tests"}
    assert [module.at(node) for node, target in imports(module) if target.split(".")[0] in outside] == []


def test_ci_pins_everything_the_library_needs() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    project = pyproject()["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert {requirement.partition(">=")[0] for requirement in needed} <= pinned


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "offload" / "py.typed").exists()


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
