"""Hyper-parameters: plain numbers of every group, taken at `step()`, and what a kernel makes of them.

Owns: the snapshot of a group's options, and the order in which each kernel wants them.
Does not: choose an optimizer's state tensors (kinds.py) or run a kernel (kernel_step.py).
Threads: made by the training thread; read by the step lane.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from offload.kernels import adagrad, adam, lion, sgd

Options = Mapping[str, Any]
"""One of an optimizer's `param_groups`."""


class Hyper(Protocol):
    """Options of one group as they were when `step()` was called; a change after that does not touch the step."""

    @property
    def state_tensors(self) -> tuple[str, ...]:
        """State tensors that the kernel takes, in its order, after master or remainder."""

    def kernel(self, gradient: str, weights: str, master: str) -> Callable[..., None]:
        """The kernel for these dtypes and this form of master; compiled when first asked for."""

    def arguments(self, num_steps: int, scale: float) -> tuple[Any, ...]:
        """What the kernel takes after the number of the first element, at a parameter's `num_steps`-th step."""


@dataclass(frozen=True, slots=True)
class AdamHyper:
    """One group of Adam or AdamW."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    amsgrad: bool
    state: str
    """How moments are stored: fp32, bf16 or 8bit."""

    @classmethod
    def of(cls, options: Options, *, state: str) -> "AdamHyper":
        """From the options of a group."""
        beta1, beta2 = options["betas"]
        return cls(
            lr=float(options["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(options["eps"]),
            weight_decay=float(options["weight_decay"]),
            decoupled=bool(options["decoupled_weight_decay"]),
            maximize=bool(options["maximize"]),
            amsgrad=bool(options["amsgrad"]),
            state=state,
        )

    @property
    def state_tensors(self) -> tuple[str, ...]:
        """See Hyper."""
        if self.state == "8bit":
            return ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if self.amsgrad else 2]

    def kernel(self, gradient: str, weights: str, master: str) -> Callable[..., None]:
        """See Hyper."""
        return adam.step_kernel(gradient, weights, master=master, state=self.state, amsgrad=self.amsgrad)

    def arguments(self, num_steps: int, scale: float) -> tuple[Any, ...]:
        """See Hyper. Rounding of bf16 moments is seeded by the step, so that a run can be repeated and resumed."""
        correction1, correction2_sqrt = 1.0 - self.beta1**num_steps, math.sqrt(1.0 - self.beta2**num_steps)
        numbers = (
            self.lr, self.beta1, self.beta2, self.eps, self.weight_decay, correction1, correction2_sqrt,
            -scale if self.maximize else scale, self.decoupled,
        )  # fmt: skip
        return (*numbers, num_steps) if self.state == "bf16" else numbers


@dataclass(frozen=True, slots=True)
class LionHyper:
    """One group of Lion."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool

    @classmethod
    def of(cls, options: Options) -> "LionHyper":
        """From the options of a group."""
        beta1, beta2 = options["betas"]
        decay, maximize = float(options["weight_decay"]), bool(options["maximize"])
        return cls(float(options["lr"]), float(beta1), float(beta2), decay, maximize)

    @property
    def state_tensors(self) -> tuple[str, ...]:
        """See Hyper."""
        return ("exp_avg",)

    def kernel(self, gradient: str, weights: str, master: str) -> Callable[..., None]:
        """See Hyper."""
        return lion.step_kernel(gradient, weights, master=master)

    def arguments(self, num_steps: int, scale: float) -> tuple[Any, ...]:
        """See Hyper."""
        return self.lr, self.beta1, self.beta2, self.weight_decay, -scale if self.maximize else scale


@dataclass(frozen=True, slots=True)
class AdagradHyper:
    """One group of Adagrad."""

    lr: float
    lr_decay: float
    eps: float
    weight_decay: float
    maximize: bool

    @classmethod
    def of(cls, options: Options) -> "AdagradHyper":
        """From the options of a group."""
        lr, lr_decay, eps, decay = (float(options[name]) for name in ("lr", "lr_decay", "eps", "weight_decay"))
        return cls(lr, lr_decay, eps, decay, bool(options["maximize"]))

    @property
    def state_tensors(self) -> tuple[str, ...]:
        """See Hyper."""
        return ("sum",)

    def kernel(self, gradient: str, weights: str, master: str) -> Callable[..., None]:
        """See Hyper."""
        return adagrad.step_kernel(gradient, weights, master=master)

    def arguments(self, num_steps: int, scale: float) -> tuple[Any, ...]:
        """See Hyper."""
        clr = self.lr / (1.0 + (num_steps - 1) * self.lr_decay)
        return clr, self.eps, self.weight_decay, -scale if self.maximize else scale


@dataclass(frozen=True, slots=True)
class SGDHyper:
    """One group of SGD, with momentum or without."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool

    @classmethod
    def of(cls, options: Options) -> "SGDHyper":
        """From the options of a group."""
        lr, momentum, dampening, decay = (
            float(options[name]) for name in ("lr", "momentum", "dampening", "weight_decay")
        )
        return cls(lr, momentum, dampening, decay, bool(options["nesterov"]), bool(options["maximize"]))

    @property
    def state_tensors(self) -> tuple[str, ...]:
        """See Hyper."""
        return ("momentum_buffer",) if self.momentum else ()

    def kernel(self, gradient: str, weights: str, master: str) -> Callable[..., None]:
        """See Hyper."""
        return sgd.step_kernel(gradient, weights, master=master, momentum=bool(self.momentum))

    def arguments(self, num_steps: int, scale: float) -> tuple[Any, ...]:
        """See Hyper."""
        scale = -scale if self.maximize else scale
        if not self.momentum:
            return self.lr, self.weight_decay, scale
        is_first_step = num_steps == 1
        return self.lr, self.momentum, self.dampening, self.weight_decay, scale, self.nesterov, is_first_step
