"""Every wait in offload/, found in the syntax tree.

Owns: what counts as a wait, and the names that stay true when lines move.
"""

import ast
from dataclasses import dataclass

from tests.doubles.turns import SOURCES


@dataclass(frozen=True)
class Site:
    """One call that waits: `lanes.wait(future, reason)` or `queue.after(mark, reason)`."""

    name: str
    """`file function REASON`, with a number from the second of the same name on."""
    place: str
    """`file:line`, as `TurnLanes` sees it."""


def find_sites() -> list[Site]:
    """All waits, file by file."""
    sites: list[Site] = []
    for path in sorted(SOURCES.rglob("*.py")):
        if "kernels" in path.parts or path.name == "lanes.py" or path.parent.name == "cli":
            continue  # a command waits for the end of what it measures, and no run of training goes through it
        file = str(path.relative_to(SOURCES))
        seen: dict[str, int] = {}
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in sorted(_waits(function), key=lambda call: call.lineno):
                name = f"{file} {function.name} {_reason(call)}"
                seen[name] = seen.get(name, 0) + 1
                number = f" {seen[name]}" if seen[name] > 1 else ""
                sites.append(Site(name + number, f"{file}:{call.lineno}"))
    return sites


def _waits(function: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(function) if isinstance(node, ast.Call) and _reason(node)]


def _reason(call: ast.Call) -> str:
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("wait", "after") or len(call.args) != 2:
        return ""
    reason = call.args[1]
    if isinstance(reason, ast.Attribute) and isinstance(reason.value, ast.Name) and reason.value.id == "Reason":
        return reason.attr
    return "any reason" if isinstance(reason, ast.Name) and reason.id == "reason" else ""
