"""torch's caching allocator for large blocks, as far as slots go: best fit, split, merge, and never given back."""

from typing import Final

MIB: Final = 1 << 20
ROUND_BYTES: Final = 512
SMALL_BYTES: Final = 1 * MIB
"""Up to here blocks come from segments of their own; what is left over beyond it is split off."""
SEGMENT_BYTES: Final = 2 * MIB


class BestFit:
    """One stream's blocks of one pool."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._segments: list[list[list[int | None]]] = []
        """Of each: [start, bytes, owner or None], by address."""

    def allocate(self, owner: int, num_bytes: int) -> None:
        """The smallest free block that is large enough, else a new segment."""
        if num_bytes <= SMALL_BYTES:
            return
        size = -(-num_bytes // ROUND_BYTES) * ROUND_BYTES
        place = self._best(size)
        if place is None:
            whole = -(-size // SEGMENT_BYTES) * SEGMENT_BYTES
            self._segments.append([[0, whole, None]])
            self.reserved_bytes += whole
            place = (len(self._segments) - 1, 0)
        segment = self._segments[place[0]]
        start, length, _ = segment[place[1]]
        assert start is not None
        assert length is not None
        if length - size > SMALL_BYTES:
            segment[place[1] : place[1] + 1] = [[start, size, owner], [start + size, length - size, None]]
        else:
            segment[place[1]][2] = owner

    def free(self, owner: int) -> None:
        """Joined with free neighbours."""
        for segment in self._segments:
            for block in segment:
                if block[2] == owner:
                    block[2] = None
            merged: list[list[int | None]] = []
            for block in segment:
                if merged and block[2] is None and merged[-1][2] is None:
                    merged[-1][1] += block[1]  # type: ignore[operator]
                else:
                    merged.append(block)
            segment[:] = merged

    def _best(self, size: int) -> tuple[int, int] | None:
        free = [
            (length, number, index)
            for number, segment in enumerate(self._segments)
            for index, (_, length, owner) in enumerate(segment)
            if owner is None and length is not None and length >= size
        ]
        return min(free)[1:] if free else None
