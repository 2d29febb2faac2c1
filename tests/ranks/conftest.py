"""One nursery of ranks for all tests of the folder."""

from collections.abc import Iterator

import pytest

from tests.ranks.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Runs functions in real ranks."""
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    made.close()
