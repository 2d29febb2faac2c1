"""A single rank: it answers every call of `Ranks` for itself, and touches nothing."""

import numpy as np
import pytest
import torch

from offload.errors import InternalError
from offload.ranks.protocol import Ranks
from offload.ranks.single import SINGLE_RANK


def test_it_is_a_world_of_one_that_shards_nothing() -> None:
    assert isinstance(SINGLE_RANK, Ranks)
    assert (SINGLE_RANK.rank, SINGLE_RANK.world_size, SINGLE_RANK.num_local) == (0, 1, 1)
    assert not SINGLE_RANK.is_sharded


def test_it_hears_its_own_values_and_changes_none() -> None:
    values, bits = np.array([0.5, -1.0]), np.array([0, 3], np.uint8)
    tensor = torch.arange(4.0)
    SINGLE_RANK.broadcast(tensor)
    SINGLE_RANK.fill_in(tensor)
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert SINGLE_RANK.totals(values).tolist() == [[0.5, -1.0]]
    assert SINGLE_RANK.unite(bits) is bits
    assert SINGLE_RANK.exchange("text") == SINGLE_RANK.saving.exchange("text") == ["text"]


def test_it_has_no_others_that_fail() -> None:
    SINGLE_RANK.note_failure("lost")
    SINGLE_RANK.close()
    assert SINGLE_RANK.failed() is None


@pytest.mark.parametrize("call", [SINGLE_RANK.all_gather, SINGLE_RANK.all_to_all, SINGLE_RANK.reduce_scatter])
def test_shards_are_not_exchanged_with_nobody(call: object) -> None:
    with pytest.raises(InternalError, match="single rank"):
        call(torch.empty(1), torch.empty(1))
