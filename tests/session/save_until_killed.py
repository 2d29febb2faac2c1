"""Trains, saves, trains, saves beside training, and says "writing" in the middle of that: then it waits to be killed.

Run as `python save_until_killed.py SWAP CHECKPOINTS KIND`, KIND being that of the disk (see cloning_disks.py).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from offload.disk import clone
from tests.doubles.cloning_disks import copy_range, gate
from tests.session.runs import Case, train
from tests.session.test_save_beside_training import on_disk


def main() -> None:
    swap, run, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind == "copying":
        clone.clone_range = copy_range
    model, optimizer, session = on_disk(Case(), swap)
    with session, gate() as writes:
        train(model, optimizer, session, range(1))
        session.save(run)
        train(model, optimizer, session, range(1, 2))
        session.save(run, wait=False)
        for _ in range(5):
            writes.wait_for_write()
            writes.let()
        writes.wait_for_write()
        train(model, optimizer, session, range(2, 3))
        print("writing", flush=True)  # noqa: T201 - for the test
        sys.stdin.readline()
        while True:
            writes.wait_for_write()


if __name__ == "__main__":
    main()
