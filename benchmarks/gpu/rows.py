"""The rows of compare.py: which engine trains what, under which limits.

Owns: the list, the device caps and our budgets under them.
Does not: run anything.

Note [Caps]: `state`: weights, one gradient and activations fit the device, 12 bytes a parameter of state do not.
`weights`: the weights do not fit either. What a cap leaves to our own bytes is what activations do not need.

Note [State off]: under `state` the plan keeps at home on the device what state fits beside weights and activations:
most of it. Rows that measure the way of all state over host or disk (`state_off`) get memory for the weights alone.
"""

from dataclasses import dataclass
from typing import Any, Final

from benchmarks.gpu.shapes import LOSS_CHUNK, SHAPES

GIB: Final = 1 << 30
CAPS: Final = {"state": 48 * GIB, "weights": 10 * GIB}
LENGTHS: Final = {"4k": 4096, "16k": 16_384, "64k": 65_536}
PARAMETERS: Final = {"tiny": 2e5, "1b": 1.2e9, "3b": 3.43e9, "7b": 6.74e9}
BESIDE_WEIGHTS: Final = 3 * GIB // 4
"""Of the device, where only weights are at home there: slots for gradients. Note [State off]."""
BESIDE_GRADIENTS: Final = 2 * GIB
"""Of the host, where only gradients are at home there: rings."""


@dataclass(frozen=True, slots=True)
class Row:
    """One process."""

    name: str
    words: str
    engine: str
    sets: tuple[str, ...]
    length: str = "16k"
    params: str = "3b"
    clip: bool = True
    cap: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


STATE_OFF: Final = (("state_off", True),)


def _main_rows() -> list[Row]:
    rows = []
    for length in LENGTHS:
        sets: tuple[str, ...] = (length,)
        rows += [
            Row(f"torch {length}", "nothing offloaded", "torch", sets, length),
            Row(f"fsdp2 {length}", "FSDP2 CPUOffloadPolicy", "fsdp2", sets, length, cap="state"),
            Row(f"torchao {length}", "torchao CPUOffloadOptimizer", "torchao", sets, length, clip=False, cap="state"),
            Row(f"ours {length}", "offload, state on the host", "offload", sets, length, cap="state",
                options=STATE_OFF),
            Row(f"ours unclipped {length}", "offload, no clipping, stepped in backward", "offload", sets, length,
                clip=False, cap="state", options=STATE_OFF),
            Row(f"ours to the cap {length}", "offload, state where it fits", "offload", sets, length, cap="state"),
        ]  # fmt: skip
    return rows


def _deepspeed(mode: str, words: str, sets: tuple[str, ...], **more: Any) -> Row:
    cap = more.pop("cap", "state")
    options = (("mode", mode), *more.items())
    return Row(f"deepspeed {mode} {cap}", words, "deepspeed", sets, cap=cap, options=options)


ROWS: Final[tuple[Row, ...]] = (
    *_main_rows(),
    Row("fsdp2 weights", "FSDP2, small device", "fsdp2", ("weights",), cap="weights"),
    Row("ours weights", "offload, small device", "offload", ("weights",), cap="weights"),
    _deepspeed("plain", "DeepSpeed, small device", ("weights", "deepspeed"), cap="weights", weights_off=True),
    _deepspeed("plain", "DeepSpeed ZeRO-3 offload", ("deepspeed",)),
    _deepspeed("superoffload", "DeepSpeed SuperOffload", ("deepspeed",)),
    _deepspeed("zenflow", "DeepSpeed ZenFlow (delays updates)", ("deepspeed",)),
    Row("ours disk", "offload, state on disk", "offload", ("disk",), cap="state",
        options=(*STATE_OFF, ("state_on_disk", True))),
    _deepspeed("disk", "DeepSpeed, state on disk", ("disk",)),
    Row("ours 7b bf16", "offload 7 B, bf16 moments", "offload", ("7b",), params="7b", cap="state",
        options=(("state_dtype", "bf16"),)),
    Row("ours 7b 8bit", "offload 7 B, 8-bit moments", "offload", ("7b",), params="7b", cap="state",
        options=(("state_dtype", "8bit"),)),
)  # fmt: skip
SETS: Final = (*LENGTHS, "weights", "deepspeed", "disk", "7b")


def activation_bytes(params: str, tokens: int) -> int:
    """What checkpointing keeps, one block recomputed, and one chunk of the loss; a quarter and 1 GiB more."""
    shape = SHAPES[params]
    kept = 2 * tokens * shape["hidden_size"] * shape["num_hidden_layers"]
    block = 2 * tokens * (12 * shape["hidden_size"] + 5 * shape["intermediate_size"])
    loss = 10 * min(tokens, LOSS_CHUNK) * 32_000
    return int(1.25 * (kept + block + loss)) + GIB


def order_for(row: Row, *, device: str, params: str | None, tokens: int | None) -> dict[str, Any]:
    """What row.py is asked. `params` and `tokens` replace the row's own, for a try on a small machine."""
    size, count = params or row.params, tokens or LENGTHS[row.length]
    options = dict(row.options)
    cap = CAPS[row.cap] if row.cap and device != "cpu" else None
    order = {"engine": row.engine, "params": size, "device": device, "tokens": count, "clip": row.clip,
             "cap_bytes": cap, "state_dtype": "fp32", **options}  # fmt: skip
    if row.engine == "offload":
        order["device_bytes"] = cap - activation_bytes(size, count) if cap else 2 * GIB
        order["host_bytes"] = None
        if cap and options.get("state_off"):
            order["device_bytes"] = int(2 * PARAMETERS[size]) + BESIDE_WEIGHTS
        if options.get("state_on_disk"):
            order["host_bytes"] = int(2 * PARAMETERS[size]) + BESIDE_GRADIENTS
        if size == "tiny":
            order |= {"device_bytes": 600_000, "host_bytes": 2_300_000 if options.get("state_on_disk") else 1 << 28}
    return order
