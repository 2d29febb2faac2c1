"""The device that a test body runs on: the host always, the accelerator where there is one (marker gpu)."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.fixture(scope="session", autouse=True)
def the_driver_is_awake() -> None:
    """A context and cuBLAS come with descriptors that stay open: no leak of the test that happens to be the first."""
    if not torch.cuda.is_available():
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once, with the first product
    x = torch.ones(64, 64, device="cuda", requires_grad=True)
    (x @ x).sum().backward()
    torch.ones(64).pin_memory()
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    event.synchronize()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """One body, both devices. On the accelerator with operators whose bits do not depend on the order of arrival."""
    if request.param == "cpu":
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield "cpu"
        torch.set_num_threads(before)
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A warning is all that the fused forms of attention give: their backward adds in the order of arrival all the same.
    with sdpa_kernel(SDPBackend.MATH):
        yield "cuda"
    torch.use_deterministic_algorithms(False)
