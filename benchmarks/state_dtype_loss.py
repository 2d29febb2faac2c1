"""Loss with rounded moments against fp32 moments, over several seeds.

    python -m benchmarks.state_dtype_loss --json benchmarks/results/state_dtype_loss.json

Owns: the runs (each `offload train` in a process of its own), and the comparison of their last losses.
Does not: time anything: losses are the same on any machine with these versions. So a result that is there already is
gone on with: runs that it holds are not repeated.

Note [Control]: training is chaotic. `control` is fp32 with a learning rate larger by one part in a million: what it
differs by is what no difference at all looks like after so many steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from benchmarks.measure.result import check_result_path, versions, write_result
from offload.config import STATE_DTYPES
from offload.report.console import Console
from offload.report.results import machine_facts

# fmt: off
TRAIN: Final = ("--params", "5m", "--precision", "fp32", "--batch", "8", "--seq", "128", "--device-memory", "1GiB")
# fmt: on
LAST: Final = 20
"""The final loss is the mean of so many last steps: one batch alone is noise."""
LIMITS: Final = {"bf16": 0.005, "8bit": 0.01}
CONTROL: Final = "control"
LR: Final = 1e-3
CONTROL_LR: Final = LR * (1 + 1e-6)
BYTES_PER_PARAMETER: Final = {"fp32": 8.0, "bf16": 4.0, "8bit": 2 + 2 * 4 / 256}
"""Both moments, without the master."""


def losses_of(name: str, seed: int, steps: int, text: Path | None) -> list[float]:
    """Losses of one run, a step each. See Note [Control]."""
    state_dtype, lr = ("fp32", CONTROL_LR) if name == CONTROL else (name, LR)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        command = [
            sys.executable,
            "-m",
            "offload",
            "train",
            *TRAIN,
            "--steps",
            str(steps),
            "--seed",
            str(seed),
            "--lr",
            repr(lr),
        ]
        command += ["--state-dtype", state_dtype, "--json", str(out)] + (["--text", str(text)] if text else [])
        environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        losses: list[float] = json.loads(out.read_text())["losses"]
        return losses


def held(path: Path, steps: int) -> dict[str, list[list[float]]]:
    """Losses that the result holds already, seed by seed from 0."""
    names = (*STATE_DTYPES, CONTROL)
    losses: dict[str, list[list[float]]] = {name: [] for name in names}
    if path.is_file():
        before = json.loads(path.read_text())["losses"]
        losses |= {n: [run for run in before.get(n, []) if len(run) == steps] for n in names}
    return losses


def compared(losses: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Final losses by seed, and how far each dtype's mean is from that of fp32."""
    final = {name: [statistics.fmean(run[-LAST:]) for run in runs] for name, runs in losses.items()}
    mean = {name: statistics.fmean(values) for name, values in final.items()}
    return {
        "final_losses": final,
        "mean_final_loss": mean,
        "relative_difference": {name: mean[name] / mean["fp32"] - 1.0 for name in mean},
        "relative_difference_by_seed": {
            name: [a / b - 1.0 for a, b in zip(values, final["fp32"], strict=True)] for name, values in final.items()
        },
        "limits": LIMITS,
        "bytes_per_parameter": BYTES_PER_PARAMETER,
    }


def line_chart(losses: dict[str, list[list[float]]]) -> str:
    """Mean loss over the seeds by step, as SVG."""
    width, height, margin = 760, 420, 60
    means = {name: [statistics.fmean(step) for step in zip(*runs, strict=True)] for name, runs in losses.items()}
    steps = len(next(iter(means.values())))
    low, high = min(map(min, means.values())), max(map(max, means.values()))

    def point(step: int, loss: float) -> str:
        x = margin + (width - 2 * margin) * step / max(1, steps - 1)
        y = height - margin - (height - 2 * margin) * (loss - low) / max(1e-9, high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{margin}" y="28" font-size="16">Loss by step, mean of {len(losses["fp32"])} seeds</text>',
        f'<text x="{margin}" y="{height - 20}">step 1 to {steps}; loss {high:.2f} (top) to {low:.2f} (bottom)</text>',
    ]
    for number, (name, colour) in enumerate(zip(means, ("#7a8288", "#1668b3", "#d9822b", "#3d8b57"), strict=False)):
        line = " ".join(point(step, loss) for step, loss in enumerate(means[name]))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        x = width - margin - 140
        parts.append(f'<text x="{x}" y="{60 + 20 * number}" fill="{colour}">{name}: {means[name][-1]:.4f}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    """Run all, write the result, say which limits hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    check_result_path(options.json)
    console = Console(sys.stdout)
    losses = {name: runs[: options.seeds] for name, runs in held(Path(options.json), options.steps).items()}
    for seed in range(options.seeds):
        for name in (*STATE_DTYPES, CONTROL):
            if len(losses[name]) > seed:
                continue
            losses[name].append(losses_of(name, seed, options.steps, options.text))
            Path(options.json).write_text(json.dumps({"losses": losses}))  # a later run goes on from here
            console.line(f"seed {seed}, {name}: {statistics.fmean(losses[name][-1][-LAST:]):.4f}")
    result = compared(losses)
    facts = {
        "machine": machine_facts(),
        "versions": versions(("torch", "numpy", "numba")),
        "command": " ".join(["offload train", *TRAIN, f"--steps {options.steps} --seed S --state-dtype D"]),
        "seeds": list(range(options.seeds)),
        "losses": losses,
    }
    write_result(options.json, result | facts, line_chart(losses))
    within = {name: abs(result["relative_difference"][name]) <= limit for name, limit in LIMITS.items()}
    for name, good in within.items():
        found, limit = result["relative_difference"][name], LIMITS[name]
        console.line(f"{name}: {found:+.3%} ({'within' if good else 'beyond'} {limit:.1%})")
    return 0 if all(within.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
