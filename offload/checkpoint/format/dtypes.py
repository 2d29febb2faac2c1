"""Dtypes by the names that safetensors files and manifests use.

Owns: the two tables, and the bytes of a tensor as they are written.
Does not: convert values (convert.py).
"""

from typing import Final

import torch
from torch import Tensor

from offload.checkpoint.format.errors import CheckpointError

DTYPE_OF: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

NAME_OF: Final = {dtype: name for name, dtype in DTYPE_OF.items()}


def name_of(dtype: torch.dtype, *, of: str) -> str:
    """The name of a dtype; `of` is what has it, for the error."""
    if dtype not in NAME_OF:
        raise CheckpointError(f"{of} has dtype {dtype}, which checkpoints cannot hold; cast it before saving.")
    return NAME_OF[dtype]


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the host, without a copy; the view keeps the memory alive."""
    if not values.numel():
        return memoryview(bytearray())  # torch refuses to see an empty tensor of some strides as bytes
    flat = values.detach().reshape(-1).as_strided((values.numel(),), (1,))  # one element may have any stride
    return memoryview(flat.view(torch.uint8).numpy().data).cast("B")
