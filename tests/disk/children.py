"""Programs that the tests start in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import offload.errors

ROOT = Path(offload.errors.__file__).parents[1]

WITHOUT_THE_PACKAGES_FACE = f"""
import sys, types
sys.modules["offload"] = types.ModuleType("offload")
sys.modules["offload"].__path__ = [{str(ROOT / "offload")!r}]
"""
"""Modules of the package are then imported alone: `import offload` brings in all of them, which takes seconds."""

WITH_NAMES = """
from offload.disk import nameless
nameless.can_be_had = lambda folder: False
"""
"""As where no file can be without a name."""


def start_python(code: str, *arguments: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """A process that runs `code`, with pipes."""
    return subprocess.Popen(
        [sys.executable, *options, "-c", WITHOUT_THE_PACKAGES_FACE + code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
