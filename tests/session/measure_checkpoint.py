"""Prints what was resident at most while a run with its state on disk trained, saved and loaded, as JSON.

Run as `python measure_checkpoint.py FOLDER`. In a process of its own: memory that earlier work has freed would count.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import offload
from offload.cli.rss import peak_rss_bytes
from offload.units import Tier

WIDTH, DEPTH = 1024, 14


def restart_peak() -> None:
    """Linux: 5 resets VmHWM to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    folder = Path(sys.argv[1])
    with offload.deferred_init():
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    peaks = {}
    with offload.enable(
        model, optimizer, device="cpu", device_memory="16MiB", host_memory="80MiB", disk=folder, precision="bf16",
        accumulate=1,
    ) as session:  # fmt: skip
        run = {
            "train": lambda: (model(torch.ones(2, WIDTH, dtype=torch.bfloat16)).sum().backward(), optimizer.step()),
            "save": lambda: session.save(folder / "run").wait(),
            "load": lambda: session.load(folder / "run"),
            "export": lambda: session.export(folder / "out"),
        }
        for name in ("train", *run):  # the first step makes what later ones keep
            restart_peak()
            run[name]()
            metrics = session.metrics()
            peaks[name] = peak_rss_bytes()
        result = {
            "peak_rss_bytes": peaks,
            "host_peak_bytes": metrics["peak_bytes"][Tier.HOST],
            "host_budget_bytes": metrics["budget_bytes"][Tier.HOST],
            "state_on_disk_bytes": metrics["homes"]["state"].get(Tier.DISK, 0),
        }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
