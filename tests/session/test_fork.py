"""A forked child has none of a session's threads: what it asks of the session is refused, and the parent trains on."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, signal, sys
import torch
import offload
from offload.errors import SessionFailedError

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

def train():
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()

def refused(call):
    try:
        call()
    except SessionFailedError as error:
        return "forked process" in str(error)
    return False

budgets = {"device_memory": "1MiB", "host_memory": "64MiB", "disk": sys.argv[1]}
with offload.enable(model, optimizer, device="cpu", **budgets) as session:
    train()
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that hangs
        answers = refused(optimizer.step), refused(lambda: session.save(sys.argv[1])), refused(session.weights_sha256)
        session.close()
        os.write(1, f"{answers}\\n".encode())
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    train()
    print(status, len(session.weights_sha256()), flush=True)
"""


def test_a_child_is_refused_at_once_closes_in_peace_and_the_parent_trains_on(tmp_path: Path) -> None:
    done = subprocess.run(
        # Newer Pythons warn of forks of programs with threads: that is what is tested.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=100, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "(True, True, True)\n0 64\n", done.stderr
    assert list(tmp_path.iterdir()) == []
