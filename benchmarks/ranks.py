"""One model on one to four ranks of this machine: what each rank holds, and that the losses stay those of one rank.

    python -m benchmarks.ranks --json benchmarks/results/ranks.json

Owns: the runs (each `torchrun -m offload train` with the same global batch, twice for each number of ranks), the plain
torch loop they are compared with, the comparison of their losses and weights, and the file of the result.
Does not: measure time: the ranks share this machine's cores, and their messages go through its memory. What the ranks
save is bytes.
Threads: the main thread.

Note [Parts]: W ranks sum the gradients of W parts of the batch, and a sum of other parts is rounded in another way;
training makes any such difference grow with each step, by how much depends on the seed. So W ranks are compared with
plain torch in one process that sums the gradients of the same W parts in the same order. How far both are from their
own run of one part is told beside it: that is what the rounding does, in torch as here.

Note [Control]: plain torch with a learning rate larger by one part in a million (as in state_dtype_loss.py): what
its losses differ by is what no difference at all looks like after so many steps. Where that is more than the
tolerance, it is the tolerance.
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

import torch

from benchmarks.measure.chart import Bar, bar_chart
from benchmarks.measure.result import REPOSITORY, check_result_path, command_of, versions, write_result
from offload.cli.gpt import GPT, config_for, parse_count
from offload.cli.numbers import at_least_one, not_negative
from offload.cli.text import Windows, open_text
from offload.cli.train import BETAS, WEIGHT_DECAY
from offload.errors import OffloadError
from offload.report.console import Console, format_table
from offload.report.results import STANDARD_OUTPUT, machine_facts
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
"""Of the losses, relative, against plain torch with the same parts; see Note [Control]."""
LR: Final = 1e-3
MAX_GRAD_NORM: Final = 1.0
CONTROL_LR: Final = LR * (1 + 1e-6)
KINDS: Final = ("weights", "gradients", "state")
RUN_TIMEOUT_S: Final = 900.0


class RunFailed(OffloadError):
    """A run ended with an error, or not in time."""


def train(num_ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """The JSON of one run."""
    with tempfile.TemporaryDirectory(prefix="ranks-", dir=options.disk) as folder:
        out = Path(folder) / "run.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "-m", "offload"]
        given = {
            "--params": options.params, "--precision": "fp32", "--batch": BATCH, "--seq": options.seq,
            "--steps": options.steps, "--seed": options.seed, "--device-memory": DEVICE_MEMORY,
            "--host-memory": f"{HOST_MEMORY_MIB * num_ranks}MiB", "--disk": folder, "--text": options.text,
            "--lr": repr(LR), "--max-grad-norm": MAX_GRAD_NORM, "--json": out,
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


def train_plainly(num_parts: int, options: argparse.Namespace, lr: float = LR) -> list[float]:
    """The losses of a loop of torch alone, with the gradients of so many parts of each batch summed in their order."""
    windows = Windows(open_text(options.text), batch=BATCH, seq=options.seq, seed=options.seed)
    torch.manual_seed(options.seed)
    model = GPT(config_for(parse_count(options.params), seq=options.seq))
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    losses = []
    for _ in range(options.steps):
        sums: list[torch.Tensor] = []
        whole_loss = 0.0
        for part in torch.from_numpy(windows.draw()).long().chunk(num_parts):
            loss = model(part[:, :-1], part[:, 1:])
            gradients = torch.autograd.grad(loss, weights)
            sums = [whole.add_(one) for whole, one in zip(sums, gradients, strict=True)] if sums else list(gradients)
            whole_loss += loss.item()
        for weight, gradient in zip(weights, sums, strict=True):
            weight.grad = gradient.mul_(1.0 / num_parts)
        torch.nn.utils.clip_grad_norm_(weights, MAX_GRAD_NORM)
        optimizer.step()
        losses.append(whole_loss / num_parts)
    return losses


def differences_of(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    """Relative, a step each."""
    return [abs(loss / other - 1.0) for loss, other in zip(losses, others, strict=True)]


def row_of(num_ranks: int, runs: Sequence[dict[str, Any]], plain: Sequence[float]) -> dict[str, Any]:
    """What is shown of one number of ranks. `plain`: the losses of plain torch with as many parts."""
    first = runs[0]
    differences = differences_of(first["losses"], plain)
    return {
        "ranks": num_ranks,
        "bytes_of_a_rank": {kind: first["homes"][kind] for kind in KINDS},
        "peak_bytes_of_the_first_rank": first["peak_bytes"],
        "losses": first["losses"],
        "losses_of_plain_torch": plain,
        "relative_differences": differences,
        "relative_difference": max(differences),
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
        alone = [max(differences_of(row[losses], rows[0][losses])) for losses in ("losses", "losses_of_plain_torch")]
        loss = f"{row['losses'][-1]:.6f}"
        told = [f"{one:.1e}" for one in (row["relative_difference"], *alone)]
        lines.append([str(row["ranks"]), *kinds, format_bytes(held_bytes(row)), loss, *told, same])
    heads = [
        "ranks",
        *(f"{kind} of a rank" for kind in KINDS),
        "in all",
        "last loss",
        "from torch, same parts",
        "from one rank",
        "torch from one part",
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
        f"Losses differ by {worst:.1e} at most, relative, from those of plain torch that sums the same parts of the "
        f"batch; its own by {control:.1e} where the learning rate is larger by 1e-6.",
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
        "command": f"python -m benchmarks.ranks{command_of(sys.argv[1:]).removeprefix('offload')}",
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
    for num_ranks in RANKS:
        runs = [train(num_ranks, options) for _ in range(RUNS)]
        rows.append(row_of(num_ranks, runs, train_plainly(num_ranks, options)))
        console.line(f"{num_ranks} ranks: last loss {runs[0]['losses'][-1]:.6f}")
    control = differences_of(train_plainly(1, options, CONTROL_LR), rows[0]["losses_of_plain_torch"])
    console.line(f"\n{table(rows)}\n")
    limit = max(TOLERANCE, *control)
    worst = max(row["relative_difference"] for row in rows)
    close = worst <= limit
    same = all(row["same_bits"] for row in rows)
    console.line(f"from torch with the same parts: {worst:.1e}, limit {limit:.1e} (control: {max(control):.1e})")
    console.line(f"two runs of each number of ranks have the same bits: {same}")
    if options.json is not None:
        found = {"parameters": runs[0]["params"], "rows": rows, "control_relative_differences": control}
        whole = facts | found | {"met": {"as_plain_torch_with_the_same_parts": close, "same_bits": same}}
        for file in write_result(options.json, whole, chart_of(rows, runs[0]["params"], max(control))):
            console.line(f"wrote {file}")
    return 0 if close and same else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except OffloadError as error:
        Console(sys.stderr).line(f"{type(error).__name__}: {error}")
        raise SystemExit(2) from error
