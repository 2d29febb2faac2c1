"""The formats of others, by name: where exports go, and what a path to be loaded holds.

Owns: the names of formats and dtypes that users write, and when a format's code is loaded.
Does not: read or write (export_hf.py, import_dcp.py and their neighbours).
Threads: one.

Note [Loaded when asked for]: `torch.distributed.checkpoint` takes a second to import, which no other command should
wait for. So its two modules are loaded here, by name, and imported nowhere else.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from offload.checkpoint.format import folder as folders
from offload.checkpoint.format.dcp_names import METADATA
from offload.checkpoint.format.export_hf import INDEX, SINGLE, Exported, export_hf
from offload.checkpoint.format.import_hf import HuggingFaceFolder
from offload.checkpoint.format.reader import Checkpoint
from offload.checkpoint.format.state import Item, OpenReader, StateReader
from offload.errors import ConfigError

HF: Final = "hf"
DCP: Final = "dcp"
FORMATS: Final = (HF, DCP)

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(reader: StateReader, out: Path, *, to: str = HF, dtype: str | None = None) -> Exported:
    """Write what a reader holds to the folder `out`, in one of FORMATS.

    `dtype`, one of DTYPES, is that of all floating-point parameters; None keeps each one's own.
    """
    check(to, dtype)
    chosen = DTYPES[dtype] if dtype is not None else None
    if to == HF:
        return export_hf(reader, out, dtype=chosen)
    exported: Exported = _loaded("export_dcp").export_dcp(reader, out, dtype=chosen)
    return exported


def check(to: str, dtype: str | None) -> None:
    """Raise for a format or dtype that is none of ours."""
    if to not in FORMATS:
        raise ConfigError(f"format {to!r}: expected one of {', '.join(FORMATS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.")


def open_stored(path: str | Path, items: Sequence[Item]) -> OpenReader:
    """Whatever a path holds, opened for `load` into a model with these items.

    A checkpoint of ours, or the folder of a run; a folder of Hugging Face or one of its files; a folder of
    `torch.distributed.checkpoint`.
    """
    path = Path(path)
    is_ours = (path / folders.MANIFEST).exists() or (path / folders.LATEST).exists()
    if not is_ours and (path / METADATA).exists():
        distributed: OpenReader = _loaded("import_dcp").DistributedCheckpoint(path, items)
        return distributed
    if not is_ours and (path.suffix == ".safetensors" or (path / SINGLE).exists() or (path / INDEX).exists()):
        return HuggingFaceFolder(path, items)
    return Checkpoint(path)


def _loaded(name: str) -> Any:
    """See Note [Loaded when asked for]."""
    return importlib.import_module(f"{__package__}.{name}")
