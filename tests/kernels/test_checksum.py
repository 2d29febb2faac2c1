"""The checksum is the one written down, and sees what disks do wrong."""

import numpy as np
import pytest

from offload.kernels.checksum import NUM_ACCUMULATORS, PRIME, checksum_kernel


def checksum(words: np.ndarray) -> int:
    return int(checksum_kernel()(words, np.full(NUM_ACCUMULATORS, 7, np.uint64)))


def oracle(words: np.ndarray) -> int:
    """With Python's own integers."""
    mask, prime = 2**64 - 1, int(PRIME)

    def mixed(sum_so_far: int, word: int) -> int:
        product = (sum_so_far ^ word) * prime & mask
        return (product << 29 | product >> 35) & mask

    accumulators = [(i + 1) * prime & mask for i in range(NUM_ACCUMULATORS)]
    for index, word in enumerate(words.tolist()):
        accumulators[index % NUM_ACCUMULATORS] = mixed(accumulators[index % NUM_ACCUMULATORS], word)
    total = len(words)
    for accumulator in accumulators:
        total = mixed(total, accumulator)
    total = (total ^ total >> 32) * prime & mask
    return total ^ total >> 32


@pytest.fixture
def words(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2**64, 512, dtype=np.uint64)


@pytest.mark.parametrize("stripes", [0, 1, 2, 16, 33])
def test_the_kernel_matches_the_oracle(stripes: int, rng: np.random.Generator) -> None:
    words = rng.integers(0, 2**64, stripes * NUM_ACCUMULATORS, dtype=np.uint64)
    assert checksum(words) == oracle(words)


def test_every_flipped_bit_changes_the_sum(words: np.ndarray) -> None:
    good = checksum(words)
    for index in (0, 31, 32, 300, 511):
        for bit in range(64):
            words[index] ^= np.uint64(1) << np.uint64(bit)
            assert checksum(words) != good
            words[index] ^= np.uint64(1) << np.uint64(bit)
    assert checksum(words) == good


def test_what_disks_do_wrong_changes_the_sum(words: np.ndarray) -> None:
    """Scenario: sectors of 512 bytes swapped, shifted, or of zeros; the same top bit flipped in two words of an
    accumulator."""
    swapped = np.concatenate([words[64:128], words[:64], words[128:]])
    lost = words.copy()
    lost[64:128] = 0
    flipped = words.copy()
    flipped[[0, NUM_ACCUMULATORS]] ^= np.uint64(1) << np.uint64(63)
    sums = [checksum(each) for each in (words, swapped, np.roll(words, 64), lost, flipped, words[:-NUM_ACCUMULATORS])]
    assert len(set(sums)) == len(sums)


def test_zeros_of_different_lengths_have_different_sums() -> None:
    sums = [checksum(np.zeros(stripes * NUM_ACCUMULATORS, np.uint64)) for stripes in range(50)]
    assert len(set(sums)) == len(sums)


def test_memory_that_may_not_be_written_is_taken(words: np.ndarray) -> None:
    good = checksum(words)
    words.flags.writeable = False
    assert checksum(words) == good
