"""Sizes that keep the house easy to live in: lines a function, attributes a class, positional arguments, asserts.

A file may be long where it is one thought: nothing here counts the lines of files.
"""

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.source import Module, modules

MOST_LINES = 60
MOST_ATTRIBUTES = 15
MOST_POSITIONAL = 7
"""Kernels excepted: numba takes arrays and numbers one by one."""
MOST_NOT_NONE = 4
"""Asserts in the whole package that something is not None: a type says it better."""

RECORDS = frozenset({"Config", "Plan"})
"""Frozen records that are one line a field: what the user asked for, and what was planned."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(params=modules(), ids=lambda module: module.name)
def module(request: pytest.FixtureRequest) -> Module:
    return request.param


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def attributes(cls: ast.ClassDef) -> set[str]:
    """What instances hold: fields of a dataclass, and whatever a method assigns to `self`."""
    found = {
        node.target.id for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return found | {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


def num_positional(function: Function) -> int:
    arguments = [*function.args.posonlyargs, *function.args.args]
    return len([a for a in arguments if a.arg not in ("self", "cls")])


def num_lines(function: Function) -> int:
    """Without the docstring: that of a function with many options lists them."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    num_documentation = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - num_documentation


def test_no_function_is_longer_than_a_screen(module: Module) -> None:
    long = [f"{module.at(f)} {f.name}" for f in functions(module) if num_lines(f) > MOST_LINES]
    assert not long


def test_no_class_holds_more_than_one_can_keep_in_mind(module: Module) -> None:
    classes = [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef) and node.name not in RECORDS]
    large = {f"{module.at(c)} {c.name}": len(attributes(c)) for c in classes if len(attributes(c)) > MOST_ATTRIBUTES}
    assert not large


def test_no_function_takes_a_row_of_positional_arguments(module: Module) -> None:
    if module.folder == "offload.kernels":
        return
    many = [f"{module.at(f)} {f.name}" for f in functions(module) if num_positional(f) > MOST_POSITIONAL]
    assert not many


def test_no_constructor_takes_more_than_seven_arguments(module: Module) -> None:
    many = [
        f"{module.at(f)} {len(f.args.kwonlyargs) + num_positional(f)}"
        for f in functions(module)
        if f.name == "__init__" and len(f.args.kwonlyargs) + num_positional(f) > MOST_POSITIONAL
    ]
    assert not many


def test_types_say_what_is_there_and_asserts_do_not() -> None:
    found = [
        module.at(node)
        for module in modules()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Assert) and "is not None" in ast.unparse(node.test)
    ]
    assert len(found) <= MOST_NOT_NONE, found
