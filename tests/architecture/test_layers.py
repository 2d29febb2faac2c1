"""Imports point down: lower levels and the own folder, never sideways between folders, never in a function."""

import ast

import pytest

from tests.architecture.source import Module, imports, modules

# The folders and files of the package by level. `report` stands below the package's face, which stands below the
# command line.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "units"),
    ("kernels",),
    ("concurrency", "config", "optim"),
    ("device", "disk", "model"),
    ("memory", "planning"),
    ("ranks",),
    ("runtime",),
    ("storage",),
    ("weights", "gradients", "activations"),
    ("optimizer",),
    ("checkpoint",),
    ("report", "integrations"),
    ("assembly", "open_sessions", "session", "enable"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def part_of(name: str) -> str:
    """The folder or file of the package in which module `name` lies: `disk` for offload.disk.layout."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.fixture(params=modules(), ids=lambda module: module.name)
def module(request: pytest.FixtureRequest) -> Module:
    return request.param


def test_every_file_has_a_level(module: Module) -> None:
    assert part_of(module.name) in LEVEL_OF, f"{module.path} is in no level: design it, then list it in LEVELS"


def test_imports_point_down(module: Module) -> None:
    level = LEVEL_OF[part_of(module.name)]
    wrong = []
    for node, target in imports(module):
        if target.split(".")[0] != "offload":
            continue
        own_folder = part_of(target) == part_of(module.name)
        # two files of the package's root that share a level lie in one folder, but a file and a folder do not
        both_files = module.folder == "offload" and part_of(target) in LEVEL_OF and target in root_files()
        allowed = own_folder or LEVEL_OF[part_of(target)] < level or (both_files and LEVEL_OF[part_of(target)] == level)
        if not allowed:
            wrong.append(f"{module.at(node)} imports {target}")
    assert not wrong


def root_files() -> set[str]:
    return {m.name for m in modules() if m.folder == "offload"}


def test_nothing_imports_the_top_level_name_kernels(module: Module) -> None:
    wrong = [module.at(node) for node, target in imports(module) if target.split(".")[0] == "kernels"]
    assert not wrong, "the kernels are imported as offload.kernels"


def test_no_import_stands_in_a_function(module: Module) -> None:
    functions = (n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    wrong = {
        module.at(node)
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert not wrong


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {m.name for m in modules()}
    edges = {m.name: {t for _, t in imports(m) if t in known and t != m.name} for m in modules()}
    left = dict(edges)
    while leaves := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in leaves:
            del left[name]
    assert not left, "these import each other, or import those that do"
