"""The machine code of a kernel. A kernel from numba's cache on disk has none to show, so it is compiled anew."""

import re
from collections.abc import Callable
from typing import Any

import numba


def assembly_of(kernel: Callable[..., Any]) -> str:
    """Assembly of a compiled kernel, with the options of its own compilation less the cache."""
    signature = kernel.nopython_signatures[0]  # type: ignore[attr-defined]
    options = {**kernel.targetoptions, "nopython": True}  # type: ignore[attr-defined]
    again = numba.jit(signature, **options)(kernel.py_func)  # type: ignore[attr-defined]
    return "\n".join(again.inspect_asm().values())


def hot_loops(assembly: str) -> list[str]:
    """The innermost loops of a kernel's own function: from a label to a jump back to it."""
    lines = assembly[: assembly.index(".Lfunc_end0")].splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := re.match(r"(\.LBB\d+_\d+):", line))}
    loops = []
    for number, line in enumerate(lines):
        target = labels.get(line.split()[-1]) if line.split() else None
        if target is not None and target < number:
            loops.append((target, number))
    # A block for a rare case stands behind its loop and jumps back into it: that is no loop.
    loops = [(a, b) for a, b in loops if not any(c < a <= d < b for c, d in loops)]
    innermost = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    return ["\n".join(lines[a : b + 1]) for a, b in innermost]


def instructions_per_16(assembly: str) -> float:
    """Instructions that a kernel for x86 executes for sixteen elements: of two loops for the same elements those of the
    shorter one (without L2), of two passes over them (only one of which divides) those of both."""
    shortest: dict[bool, float] = {}
    for loop in hot_loops(assembly):
        steps = [int(step) for step in re.findall(r"\sadd[lq]\s+\$(16|32|64|128),", loop)]
        if steps and "call" not in loop:  # those that copy a tail do
            instructions = len(re.findall(r"^\t[a-z]", loop, flags=re.MULTILINE))
            is_dividing = "vdivps" in loop
            shortest[is_dividing] = min(shortest.get(is_dividing, 1e9), instructions * 16 / max(steps))
    return sum(shortest.values())
