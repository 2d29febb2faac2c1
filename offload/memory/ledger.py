"""Bytes held now, by tier and owner, against the budgets.

Owns: the count of every byte that this package holds, and its peak.
Does not: allocate (memory/region.py, device/, disk/swap_file.py) or decide budgets (planning/plan.py).
Threads: everything may be called from any thread.
"""

import threading
from collections.abc import Mapping

from offload.errors import InternalError
from offload.units import Tier, format_bytes


class Ledger:
    """What is held in each tier, by whom. A budget of None (or none given) is no limit."""

    def __init__(self, budgets: Mapping[Tier, int | None]) -> None:
        self._budgets = {tier: budgets.get(tier) for tier in Tier}
        self._lock = threading.Lock()
        self._owners: dict[Tier, dict[str, int]] = {tier: {} for tier in Tier}
        self._held = dict.fromkeys(Tier, 0)
        self._peaks = dict.fromkeys(Tier, 0)

    def charge(self, tier: Tier, owner: str, num_bytes: int) -> None:
        """Count `num_bytes` more for `owner`. Over the budget: raises InternalError and counts nothing."""
        self._check_count(tier, owner, num_bytes)
        with self._lock:
            budget = self._budgets[tier]
            owned = self._owners[tier].get(owner, 0)
            held = self._held[tier] + num_bytes
            if budget is not None and held > budget:
                raise InternalError(
                    f"{tier} memory: {owner!r} wants {num_bytes} bytes more and holds {owned}; with the "
                    f"{self._held[tier]} held by all owners that exceeds the budget of {budget} bytes "
                    f"({format_bytes(budget)}). The plan must not allow this; please report it with the plan."
                )
            self._owners[tier][owner] = owned + num_bytes
            self._held[tier] = held
            self._peaks[tier] = max(self._peaks[tier], held)

    def discharge(self, tier: Tier, owner: str, num_bytes: int) -> None:
        """Count `num_bytes` less for `owner`. Raises InternalError where the owner holds less than that."""
        self._check_count(tier, owner, num_bytes)
        with self._lock:
            owned = self._owners[tier].get(owner, 0)
            if num_bytes > owned:
                raise InternalError(
                    f"{tier} memory: {owner!r} releases {num_bytes} bytes but holds only {owned}: "
                    "something was released twice. Please report it."
                )
            if num_bytes == owned:
                self._owners[tier].pop(owner, None)
            else:
                self._owners[tier][owner] = owned - num_bytes
            self._held[tier] -= num_bytes

    def held(self, tier: Tier) -> int:
        """Bytes held now by all owners."""
        with self._lock:
            return self._held[tier]

    def peak(self, tier: Tier) -> int:
        """The most bytes held at once since the start or the last `restart_peaks`."""
        with self._lock:
            return self._peaks[tier]

    def budget(self, tier: Tier) -> int | None:
        """The limit of a tier, or None."""
        return self._budgets[tier]

    def restart_peaks(self) -> None:
        """Let the peaks start anew from what is held now."""
        with self._lock:
            self._peaks = dict(self._held)

    def _check_count(self, tier: Tier, owner: str, num_bytes: int) -> None:
        if num_bytes < 0:
            raise InternalError(f"{tier} memory: {owner!r} counted {num_bytes} bytes; counts must not be negative.")
