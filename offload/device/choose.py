"""Which device a session computes on.

Owns: the choice between the CPU and an accelerator.
Does not: know how either copies (host.py, accelerator.py).
Threads: the training thread.
"""

import torch

from offload.concurrency.lanes import Lanes
from offload.device.accelerator import AcceleratorDevice, default_accelerator
from offload.device.host import HostDevice
from offload.device.protocol import Device
from offload.errors import ConfigError

__all__ = ["default_accelerator", "make_device"]


def make_device(device: "torch.device | str | None", lanes: Lanes) -> Device:
    """The device of this name; by default the accelerator where there is one, else the CPU."""
    if device is None:
        device = default_accelerator() or "cpu"
    chosen = torch.device(device)
    if chosen.type == "cpu":
        if chosen.index:
            raise ConfigError(f"device={str(device)!r} is not there: there is one CPU device; use device='cpu'.")
        return HostDevice(lanes)
    if default_accelerator() is None:
        raise ConfigError(f"device={str(device)!r} was asked for and torch finds no accelerator; use device='cpu'.")
    return AcceleratorDevice(chosen, lanes)
