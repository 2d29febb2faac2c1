"""The ledger counts every byte once and never lets a budget be exceeded."""

import threading

import pytest

from offload.errors import InternalError
from offload.memory.ledger import Ledger
from offload.units import Tier


def test_charges_and_discharges_are_counted_by_tier() -> None:
    ledger = Ledger({Tier.HOST: 100, Tier.DEVICE: None})
    ledger.charge(Tier.HOST, "weights", 60)
    ledger.charge(Tier.HOST, "state", 30)
    ledger.charge(Tier.DEVICE, "slots", 10**15)
    ledger.discharge(Tier.HOST, "weights", 20)
    assert (ledger.held(Tier.HOST), ledger.peak(Tier.HOST), ledger.budget(Tier.HOST)) == (70, 90, 100)
    assert (ledger.held(Tier.DEVICE), ledger.budget(Tier.DEVICE)) == (10**15, None)
    assert (ledger.held(Tier.DISK), ledger.budget(Tier.DISK)) == (0, None)


def test_a_charge_over_the_budget_raises_with_all_numbers_and_counts_nothing() -> None:
    ledger = Ledger({Tier.HOST: 100})
    ledger.charge(Tier.HOST, "weights", 70)
    ledger.charge(Tier.HOST, "state", 30)  # exactly full is allowed
    with pytest.raises(InternalError, match=r"'state' wants 1 bytes more and holds 30.*budget of 100 bytes"):
        ledger.charge(Tier.HOST, "state", 1)
    assert ledger.held(Tier.HOST) == 100
    ledger.discharge(Tier.HOST, "state", 30)
    ledger.discharge(Tier.HOST, "weights", 70)
    assert ledger.peak(Tier.HOST) == 100


def test_releasing_more_than_an_owner_holds_raises_and_counts_nothing() -> None:
    ledger = Ledger({})
    ledger.charge(Tier.HOST, "weights", 5)
    ledger.charge(Tier.HOST, "state", 5)
    with pytest.raises(InternalError, match="'state' releases 6 bytes but holds only 5"):
        ledger.discharge(Tier.HOST, "state", 6)
    with pytest.raises(InternalError, match="'nobody'"):
        ledger.discharge(Tier.HOST, "nobody", 1)
    assert ledger.held(Tier.HOST) == 10


def test_an_owner_that_has_given_everything_back_holds_nothing() -> None:
    ledger = Ledger({})
    ledger.charge(Tier.HOST, "weights", 5)
    ledger.discharge(Tier.HOST, "weights", 5)
    ledger.discharge(Tier.HOST, "never", 0)
    assert ledger.held(Tier.HOST) == 0
    with pytest.raises(InternalError, match="'weights' releases 1 bytes but holds only 0"):
        ledger.discharge(Tier.HOST, "weights", 1)


def test_negative_counts_raise() -> None:
    ledger = Ledger({})
    with pytest.raises(InternalError, match="negative"):
        ledger.charge(Tier.HOST, "weights", -1)
    with pytest.raises(InternalError, match="negative"):
        ledger.discharge(Tier.HOST, "weights", -1)


def test_restarted_peaks_begin_at_what_is_held() -> None:
    ledger = Ledger({})
    ledger.charge(Tier.HOST, "weights", 10)
    ledger.discharge(Tier.HOST, "weights", 7)
    ledger.restart_peaks()
    assert ledger.peak(Tier.HOST) == 3
    ledger.charge(Tier.HOST, "weights", 2)
    assert ledger.peak(Tier.HOST) == 5


def test_threads_lose_no_count() -> None:
    ledger = Ledger({Tier.HOST: 8})

    def work(owner: str) -> None:
        for _ in range(2000):
            ledger.charge(Tier.HOST, owner, 2)
            ledger.discharge(Tier.HOST, owner, 2)

    threads = [threading.Thread(target=work, args=(f"owner{i % 2}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.held(Tier.HOST) == 0
    assert 2 <= ledger.peak(Tier.HOST) <= 8
