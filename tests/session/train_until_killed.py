"""Forks processes that train from the newest checkpoint until they are killed or done: imports are paid once.

Run as `python train_until_killed.py NUM_STEPS`. After "go FOLDER" it says what goes on, a line each: "resumed STEP",
then for every step "begun", "stepped" (new state is on its way to the disk), "saving" and "saved STEP", in the end
"done SHA-256 of the weights". On "kill" it sends SIGKILL and answers "killed".
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import offload
from tests.training.oracle import enable


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Dropout, so that random states matter."""
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(96, 96), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def train(folder: Path, num_steps: int) -> None:
    """A run, or the rest of one."""
    swap, run = folder / "swap", folder / "run"

    model, optimizer = build()
    with enable(model, optimizer, "disk", swap, max_grad_norm=1.0) as session:
        first = 0
        if run.exists() and any(run.glob("step-*")):
            first = session.load(run).extra["step"]
        say(f"resumed {first}")
        for step in range(first, num_steps):
            say("begun")
            batch = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
            model(batch).square().mean().backward()
            optimizer.step()
            say("stepped")
            session.weights_sha256()  # waits for the step
            optimizer.zero_grad()
            say("saving")
            session.save(run, extra={"step": step + 1}, keep=2)
            say(f"saved {step + 1}")
        sha256 = session.weights_sha256()
    say(f"done {sha256}")


def main() -> None:
    os.fsync = lambda descriptor: None  # for a power cut alone, and slow
    torch.set_num_threads(1)
    model, optimizer = build()
    with offload.enable(model, optimizer, device="cpu", device_memory="64MiB", precision="fp32"):
        pass  # kernels are compiled before the forks
    while (command := sys.stdin.readline().split()) and command[0] == "go":
        child = os.fork()
        if child == 0:
            try:
                train(Path(command[1]), int(sys.argv[1]))
            finally:
                os._exit(0)
        sys.stdin.readline()
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        say("killed")


if __name__ == "__main__":
    main()
