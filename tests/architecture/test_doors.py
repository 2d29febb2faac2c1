"""Some names may be spoken in one place only: streams in device/, asyncio in disk/, printing in report/."""

import ast
from collections.abc import Callable

import pytest

from tests.architecture.source import ROOT, Module, dotted, imports, modules

STREAM_NAMES = ("torch.cuda", "torch.accelerator", "torch.Stream", "torch.Event", "torch.xpu", "torch.mps")

PURE_CALLS = frozenset(
    {"isinstance", "issubclass", "callable", "hasattr", "len", "all", "any", "sum", "min", "max", "abs"}
    | {"set", "sorted", "list", "tuple", "dict", "type", "range", "zip"}
)


@pytest.fixture(params=modules(), ids=lambda module: module.name)
def module(request: pytest.FixtureRequest) -> Module:
    return request.param


def names_used(module: Module) -> list[tuple[ast.AST, str]]:
    """Every dotted name that is read, and every name that is imported from a module."""
    found: list[tuple[ast.AST, str]] = list(imports(module))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute):
            found.append((node, dotted(node)))
    return found


def uses(module: Module, is_named: Callable[[str], bool]) -> list[str]:
    return sorted({f"{module.at(node)} {name}" for node, name in names_used(module) if is_named(name)})


def under(*prefixes: str) -> Callable[[str], bool]:
    return lambda name: any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def test_only_device_names_streams_events_and_accelerators(module: Module) -> None:
    if module.folder != "offload.device":
        assert uses(module, under(*STREAM_NAMES)) == []


def test_only_disk_names_asyncio_and_aiofiles(module: Module) -> None:
    if module.folder != "offload.disk":
        assert uses(module, under("asyncio", "aiofiles")) == []


def test_kernels_do_not_know_torch(module: Module) -> None:
    if module.folder == "offload.kernels":
        assert uses(module, under("torch")) == []


def test_only_report_writes_to_the_terminal(module: Module) -> None:
    prints = [
        module.at(node)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and dotted(node.func) in {"print", "sys.stdout.write", "sys.stderr.write"}
    ]
    assert prints == []
    if module.folder not in {"offload.report", "offload.cli"}:
        assert uses(module, under("sys.stdout", "sys.stderr")) == []


def test_no_assert_does_work(module: Module) -> None:
    wrong = [
        module.at(node)
        for statement in ast.walk(module.tree)
        if isinstance(statement, ast.Assert)
        for node in ast.walk(statement.test)
        if isinstance(node, ast.Await | ast.NamedExpr)
        or (isinstance(node, ast.Call) and dotted(node.func) not in PURE_CALLS)
    ]
    assert wrong == [], "python -O would not do this"


def test_every_module_says_what_it_is(module: Module) -> None:
    assert ast.get_docstring(module.tree), f"{module.path} has no docstring"


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a checkout on sys.path would shadow another distribution"
    assert (ROOT / "offload" / "kernels").readlink().as_posix() == "../kernels"
