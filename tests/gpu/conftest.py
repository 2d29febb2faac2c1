"""The device that a test body runs on: the host always, the accelerator where there is one (marker gpu)."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One body, both devices. On the accelerator with operators whose bits do not depend on the order of arrival."""
    if request.param == "cpu":
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield "cpu"
        torch.set_num_threads(before)
        return
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield "cuda"
    torch.use_deterministic_algorithms(False)
