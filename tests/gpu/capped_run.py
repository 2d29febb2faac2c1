"""A model trained under a cap of the accelerator's memory: by torch alone, or by us. Prints one line of JSON.

    python tests/gpu/capped_run.py --device cuda --what ours

Owns: the cap. `--device cpu` has none: there the script only shows that it works.
"""

import argparse
import json
import sys
from typing import Any

import torch

import offload
from offload.units import MIB
from tests.gpu.rig import deep_mlp, mlp_step

WIDTH, DEPTH = 2048, 24
"""100 million parameters: 1.6 GB with state by torch alone in fp32."""
TINY_WIDTH, TINY_DEPTH = 64, 4
CAP_BYTES = 512 * MIB
STEPS = 6
LEARNING_RATE = 1e-5
"""A step of Adam moves every weight by it: with 1e-3 the outputs of 24 layers of this width overshoot at once."""


def train(what: str, device: str) -> dict[str, Any]:
    """Its figures."""
    width, depth = (WIDTH, DEPTH) if device == "cuda" else (TINY_WIDTH, TINY_DEPTH)
    dtype = torch.float32 if what == "plain" else torch.bfloat16
    x = torch.ones(8, width, device=device, dtype=dtype)
    model = deep_mlp(width, depth)
    losses = []
    if what == "plain":
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        losses = [mlp_step(model, optimizer, x) for _ in range(STEPS)]
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        memory = 192 * MIB if device == "cuda" else 96 * 1024
        with offload.enable(
            model, optimizer, device=device, device_memory=memory, host_memory="4GiB", accumulate=1
        ) as session:
            losses = [mlp_step(model, optimizer, x) for _ in range(STEPS)]
            session.metrics()
    return {"losses": [loss.item() for loss in losses]}


def main() -> int:
    """Run, and answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--what", choices=["plain", "ours"], required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {"finished": False, "cap_bytes": CAP_BYTES, "max_reserved_bytes": 0}
    if options.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(CAP_BYTES / total)
    try:
        found |= train(options.what, options.device) | {"finished": True}
    except (torch.OutOfMemoryError, offload.errors.OffloadError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    if options.device == "cuda":
        found["max_reserved_bytes"] = torch.cuda.max_memory_reserved()
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
