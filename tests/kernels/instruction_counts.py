"""A process that counts the instructions of kernels for the CPU that its environment names: writes JSON."""

import json
import sys

from offload.kernels import adam, cast, lion, moments
from tests.kernels.assembly import assembly_of, instructions_per_16

KERNELS = {
    "fused": lambda: adam.step_kernel("bf16", "bf16"),
    "fused, fp16": lambda: adam.step_kernel("fp16", "fp16"),
    "fused, split master": lambda: adam.step_kernel("bf16", "bf16", master="split"),
    "bf16 moments": lambda: adam.step_kernel("bf16", "bf16", master="split", state="bf16"),
    "8-bit moments": lambda: adam.step_kernel("bf16", "bf16", master="split", state="8bit"),
    "lion": lambda: lion.step_kernel("bf16", "bf16"),
    "8-bit to fp32": lambda: moments.decode_kernel("signed"),
    "fp32 to bf16": lambda: cast.cast_kernel("fp32", "bf16"),
}

if __name__ == "__main__":
    json.dump({name: instructions_per_16(assembly_of(make())) for name, make in KERNELS.items()}, sys.stdout)
