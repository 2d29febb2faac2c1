"""What scripts of users do around a model, run plainly and offloaded.

Owns: the loop that both share, and the comparison: what the script saw, its losses and its final weights.
Does not: know what a script does (the tables in the tests).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from tests.training.models import gpt, tokens
from tests.training.oracle import adamw, enable, weights_of

TOLERANCE = 2e-5
"""Of losses and weights against torch's AdamW after a few steps, whose sums are in another order."""


class Script:
    """One model in training. `seen` holds what a script has looked at."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, session: "offload.Session | None") -> None:
        self.model = model
        self.optimizer = optimizer
        self.session = session
        self.losses: list[float] = []
        self.seen: list[Tensor] = []
        self.num_steps = 0

    def see(self, *values: Any) -> None:
        """Remember values: copies of tensors, numbers and flags as tensors."""
        for value in values:
            held = value if isinstance(value, Tensor) else torch.as_tensor(value)
            self.seen.append(held.detach().clone().as_subclass(Tensor))

    def loss(self) -> Tensor:
        """Of the next batch."""
        return self.model(tokens(self.num_steps))

    def finish(self, loss: Tensor) -> None:
        """Backward and step."""
        self.losses.append(loss.item())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1

    def steps(self, count: int = 1) -> None:
        """Ordinary steps."""
        for _ in range(count):
            self.finish(self.loss())


Case = Callable[[Script], None]


def outcome(case: Case, home: str | None, folder: Path, build: Callable[[], nn.Module] = gpt, **options: Any) -> Script:
    """The script run plainly (`home` None) or offloaded; `seen` ends with the final weights."""
    model = build()
    optimizer = adamw(model)
    if home is None:
        script = Script(model, optimizer, None)
        case(script)
    else:
        with enable(model, optimizer, home, folder, **options) as session:
            script = Script(model, optimizer, session)
            case(script)
    script.seen += weights_of(model).values()
    return script


def check(case: Case, home: str, folder: Path, **options: Any) -> None:
    """The offloaded script sees what the plain one sees, and trains to the same weights."""
    plain, ours = outcome(case, None, folder, **options), outcome(case, home, folder, **options)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert len(ours.seen) == len(plain.seen)
    for index, (found, expected) in enumerate(zip(ours.seen, plain.seen, strict=True)):
        torch.testing.assert_close(
            found, expected, rtol=TOLERANCE, atol=TOLERANCE, check_dtype=True, msg=lambda m, i=index: f"seen[{i}]: {m}"
        )
        assert not found.isnan().any()
