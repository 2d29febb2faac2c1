"""One model on one to four ranks of this machine: what each rank holds, and that the losses stay those of one rank.

    python benchmarks/ranks.py --json benchmarks/results/ranks.json

Owns: the runs (each `torchrun -m offload train` with the same global batch, twice for each number of ranks), the
comparison of their losses and weights, and the file of the result.
Does not: measure time: the ranks share this machine's cores, and their messages go through its memory. What the ranks
save is bytes.
Threads: the main thread.

Note [Control]: gradients of other numbers of ranks are rounded in another order, and training makes any difference
grow with each step. `control` is one rank with a learning rate larger by one part in a million (as in
state_dtype_loss.py): what its losses differ by is what no difference at all looks like after so many steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from offload.cli.bench_options import at_least_one, not_negative
from offload.errors import OffloadError
from offload.report.chart import Bar, bar_chart
from offload.report.console import Console, format_table
from offload.report.results import (
    REPOSITORY,
    STANDARD_OUTPUT,
    check_result_path,
    command_of,
    machine_facts,
    versions,
    write_result,
)
from offload.units import MIB, Tier, format_bytes

RANKS: Final = (1, 2, 3, 4)
BATCH: Final = 12
"""Sequences of a step, over all ranks: divisible by each number of them."""
RUNS: Final = 2
"""Of each number of ranks: their bits are compared."""
DEVICE_MEMORY: Final = "24MiB"
"""Of each rank."""
HOST_MEMORY_MIB: Final = 24
"""Of each rank; what `--host-memory` says is shared by the ranks of a node."""
TOLERANCE: Final = 1e-5
"""Of the losses, relative. For how many steps it holds is told; see Note [Control]."""
LR: Final = 1e-3
CONTROL_LR: Final = LR * (1 + 1e-6)
KINDS: Final = ("weights", "gradients", "state")
RUN_TIMEOUT_S: Final = 900.0


class RunFailed(OffloadError):
    """A run ended with an error, or not in time."""


def train(num_ranks: int, options: argparse.Namespace, lr: float = LR) -> dict[str, Any]:
    """The JSON of one run."""
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=options.disk) as folder:
        out = Path(folder) / "run.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "-m", "offload"]
        given = {
            "--params": options.params, "--precision": "fp32", "--batch": BATCH, "--seq": options.seq,
            "--steps": options.steps, "--seed": options.seed, "--device-memory": DEVICE_MEMORY,
            "--host-memory": f"{HOST_MEMORY_MIB * num_ranks}MiB", "--disk": folder, "--text": options.text,
            "--lr": repr(lr), "--json": out,
        }  # fmt: skip
        arguments = [word for option, value in given.items() for word in (option, str(value))]
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        threads = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        try:
            done = subprocess.run(
                [*launch, "train", *arguments], capture_output=True, text=True, check=False, env=environment,
                cwd=REPOSITORY, timeout=RUN_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RunFailed(f"{num_ranks} ranks did not end in {RUN_TIMEOUT_S:.0f} s") from error
        if done.returncode != 0:
            raise RunFailed(f"{num_ranks} ranks ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found


def differences_of(run: dict[str, Any], alone: dict[str, Any]) -> list[float]:
    """Of the losses from those of one rank, relative, a step each."""
    return [abs(loss / other - 1.0) for loss, other in zip(run["losses"], alone["losses"], strict=True)]


def steps_within(differences: Sequence[float]) -> int:
    """How many first steps are within TOLERANCE."""
    return next((number for number, one in enumerate(differences) if one > TOLERANCE), len(differences))


def row_of(num_ranks: int, runs: Sequence[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """What is shown of one number of ranks. `alone`: a run of one."""
    first = runs[0]
    differences = differences_of(first, alone)
    return {
        "ranks": num_ranks,
        "bytes_of_a_rank": {kind: first["homes"][kind] for kind in KINDS},
        "peak_bytes_of_the_first_rank": first["peak_bytes"],
        "losses": first["losses"],
        "relative_differences": differences,
        "relative_difference": max(differences),
        "steps_within_tolerance": steps_within(differences),
        "weights_sha256": [run["weights_sha256"] for run in runs],
        "same_bits": all(
            (run["weights_sha256"], run["losses"]) == (first["weights_sha256"], first["losses"]) for run in runs
        ),
    }


def held_bytes(row: dict[str, Any]) -> int:
    """Of all three kinds, on all tiers."""
    return sum(sum(row["bytes_of_a_rank"][kind].values()) for kind in KINDS)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The result for people."""
    lines = []
    for row in rows:
        kinds = [
            " + ".join(f"{format_bytes(n)} {tier}" for tier, n in row["bytes_of_a_rank"][kind].items() if n)
            for kind in KINDS
        ]
        same = "yes" if row["same_bits"] else "NO"
        difference = f"{row['relative_difference']:.1e}" if row["ranks"] > 1 else "-"
        loss = f"{row['losses'][-1]:.6f}"
        lines.append([str(row["ranks"]), *kinds, format_bytes(held_bytes(row)), loss, difference, same])
    heads = [
        "ranks",
        *(f"{kind} of a rank" for kind in KINDS),
        "in all",
        "last loss",
        "largest difference",
        "same bits",
    ]
    return format_table(heads, lines)


def chart_of(rows: Sequence[dict[str, Any]], parameters: int, control: float) -> str:
    """Bytes of a rank, by kind."""
    bars = []
    for row in rows:
        for kind in KINDS:
            mib = sum(row["bytes_of_a_rank"][kind].values()) / MIB
            words = f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}: {kind}"
            bars.append(Bar(words, mib, mib, mib, kind))
    worst = max(row["relative_difference"] for row in rows)
    notes = [
        f"All tiers together. Same global batch of {BATCH} sequences, fp32, gloo on one machine.",
        f"Losses differ from those of one rank by {worst:.1e} at most, relative; by {control:.1e} where one rank has a "
        "learning rate larger by 1e-6.",
    ]
    return bar_chart(
        f"{parameters / 1e6:.1f} m parameters: bytes of each rank", bars, axis="MiB of a rank", notes=notes
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--params", default="5m", metavar="COUNT", help="size of the model (default: %(default)s)")
    add("--steps", type=at_least_one, default=20, metavar="N", help="optimizer steps (default: %(default)s)")
    add("--seq", type=at_least_one, default=64, metavar="N", help="bytes in a sequence (default: %(default)s)")
    add("--seed", type=not_negative, default=0, metavar="N", help="of weights and text (default: %(default)s)")
    add("--text", type=Path, default=REPOSITORY / "LICENSE", metavar="PATH", help="what is learned")
    add("--disk", type=Path, metavar="DIR", help="folder for swap files (default: that of temporary files)")
    add("--json", metavar="PATH", help="write the figures there, and a chart beside it (.svg)")
    options = parser.parse_args()
    check_result_path(options.json)
    return options


def main() -> int:
    """Run all, write the result, say whether losses and bits are what they should be."""
    options = parse()
    console = Console(sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
    facts = {
        "benchmark": "ranks",
        "command": f"python benchmarks/ranks.py{command_of(sys.argv[1:]).removeprefix('offload')}",
        "machine": machine_facts(),
        "versions": versions(("torch", "numpy", "numba")),
        "seeds": {"weights": options.seed, "text": options.seed},
        "backend": "gloo",
        "precision": "fp32",
        "batch": BATCH,
        "seq": options.seq,
        "steps": options.steps,
        "budget_of_a_rank": {str(Tier.DEVICE): DEVICE_MEMORY, str(Tier.HOST): f"{HOST_MEMORY_MIB}MiB"},
        "tolerance": TOLERANCE,
    }
    rows: list[dict[str, Any]] = []
    alone: dict[str, Any] = {}
    control: list[float] = []
    for num_ranks in RANKS:
        runs = [train(num_ranks, options) for _ in range(RUNS)]
        if num_ranks == 1:
            alone, control = runs[0], differences_of(train(1, options, CONTROL_LR), runs[0])
        rows.append(row_of(num_ranks, runs, alone))
        console.line(f"{num_ranks} ranks: last loss {runs[0]['losses'][-1]:.6f}")
    console.line(f"\n{table(rows)}\n")
    close = all(row["relative_difference"] <= max(control) for row in rows)
    same = all(row["same_bits"] for row in rows)
    shortest = min(row["steps_within_tolerance"] for row in rows)
    console.line(f"control: {max(control):.1e}; all losses nearer to those of one rank: {close}")
    console.line(f"within {TOLERANCE:g}: the first {shortest} of {options.steps} steps; two runs, same bits: {same}")
    if options.json is not None:
        found = {"parameters": alone["params"], "rows": rows, "control_relative_differences": control}
        whole = facts | found | {"met": {"nearer_than_control": close, "same_bits": same}}
        for file in write_result(options.json, whole, chart_of(rows, alone["params"], max(control))):
            console.line(f"wrote {file}")
    return 0 if close and same else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OffloadError as error:
        Console(sys.stderr).line(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from error
