"""Train PyTorch models whose weights, gradients and optimizer state do not fit the device.

with offload.enable(model, optimizer, device_memory="8GiB", host_memory="48GiB", disk="swap") as session:
    ...  # an ordinary training loop
"""

from offload import errors, optim
from offload.enable import enable
from offload.model.deferred import deferred_init
from offload.open_sessions import close_all
from offload.session import Session

__all__ = ["Session", "close_all", "deferred_init", "enable", "errors", "optim"]
