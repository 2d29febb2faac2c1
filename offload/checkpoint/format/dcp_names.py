"""Keys of a `torch.distributed.checkpoint` of a model and its optimizer.

Owns: the one place where these keys are spelled: those of `{"model": …, "optim": …}` with the state dictionaries that
`torch.distributed.checkpoint.state_dict.get_state_dict` makes, flattened.
Does not: read or write them (import_dcp.py, export_dcp.py).
"""

from typing import Final

METADATA: Final = ".metadata"
SUFFIX: Final = ".distcp"
STEP: Final = "step"

Path = tuple[str, ...]


def weight_path(name: str) -> Path:
    """Of a parameter or buffer."""
    return "model", name


def state_path(name: str, what: str) -> Path:
    """Of a moment or the step of a parameter."""
    return "optim", "state", name, what


def key_of(path: Path) -> str:
    """As it is flattened."""
    return ".".join(path)
