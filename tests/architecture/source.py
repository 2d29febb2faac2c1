"""The source as syntax trees: what the architecture tests look at."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Module:
    """One file of the library."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def folder(self) -> str:
        """The package the file lies in; a package's __init__ lies in itself."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def at(self, node: ast.AST) -> str:
        """Where a node stands, for messages."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


@cache
def modules() -> tuple[Module, ...]:
    """Every module of `offload` and, under its installed name, of `kernels/`."""
    found = []
    for path in sorted([*_files("offload"), *_files("kernels")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        name = ".".join(("offload", *parts) if parts[0] == "kernels" else parts)
        found.append(Module(name, path, ast.parse(path.read_text(encoding="utf-8"), str(path))))
    return tuple(found)


def imports(module: Module) -> list[tuple[ast.stmt, str]]:
    """Every import statement with the absolute name of what it imports, a module wherever that is known."""
    known = {m.name for m in modules()}
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (_relative_base(module, node.level), node.module)))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                # `from offload.disk import layout` imports the module; `from offload.units import MIB` a name in one
                is_module = full in known or any(name.startswith(f"{full}.") for name in known)
                found.append((node, full if is_module else base))
    return found


def dotted(node: ast.expr) -> str:
    """`torch.cuda.Stream` for that chain of attributes; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def _files(top: str) -> list[Path]:
    return [p for p in (ROOT / top).rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts[1:]]


def _relative_base(module: Module, level: int) -> str:
    if level == 0:
        return ""
    folder = module.folder.split(".")
    return ".".join(folder[: len(folder) - level + 1])
