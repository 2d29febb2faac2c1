"""One row of compare.py: a process that trains with one engine and answers with its figures.

    python benchmarks/gpu/row.py '{"engine": "offload", "params": "tiny", "device": "cpu", ...}'

Owns: the order of things: model, cap, engine, steps, answer.
Does not: choose (rows.py), compare (compare.py).
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from llama import (
    available_bytes,
    cap_device,
    make_model,
    make_tokens,
    model_flops,
    num_parameters,
    resident_bytes,
    run_steps,
)
from shapes import SEQUENCE


def main() -> int:
    """Train, and answer to the file that was named; standard output belongs to the engines' logs."""
    asked: dict[str, Any] = json.loads(sys.argv[1])
    asked["available_bytes"] = available_bytes()
    module = importlib.import_module(f"engine_{asked['engine']}")
    baseline_bytes = resident_bytes("VmHWM")
    model = make_model(asked["params"], asked["device"], asked["seed"])
    parameters = num_parameters(model)
    cap_device(asked["device"], asked.get("cap_bytes"))
    engine = module.make(model, asked)
    gc.collect()
    tokens = make_tokens(asked["params"], asked["tokens"], asked["device"], asked["seed"])
    found = run_steps(engine, tokens, asked)
    sequence = min(asked["tokens"], SEQUENCE)
    flops = model_flops(asked["params"], parameters, asked["tokens"], sequence)
    found |= {
        "parameters": parameters,
        "baseline_host_bytes": baseline_bytes,
        "tokens_per_s": asked["tokens"] / found["step_s"],
        "model_flops_per_s": flops / found["step_s"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "facts": engine.facts,
    }
    Path(asked["answer"]).write_text(json.dumps(found), encoding="utf-8")
    engine.close()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # the answer is written: no engine's threads or destructors may hold it back
