"""Which slot a sequence goes through, from the cost model and what already waits on this rank."""

from __future__ import annotations

from collections.abc import Sequence

from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.round_time import RoundTime


def choose_slot(length: int, waiting: Sequence[int], settings: RollingSettings, times: RoundTime) -> int:
    """The slot for a sequence of `length` tokens. waiting: tokens of this rank that wait in each slot.

    The last slot takes long sequences, chunk by chunk. A sequence goes through a shorter slot if it fits in one of its
    rounds, such a round takes no longer than a round with one full chunk (or whoever comes after it would wait for
    longer than in the long slot), and it is predicted to be done there no later than in the long slot. Each rank
    chooses for its own sequences; the others learn of it by its offers.
    """
    last = len(waiting) - 1
    longest = min(settings.max_tokens_per_round, settings.short_round_rows or settings.max_tokens_per_round)
    if last == 0 or length > longest:
        return last
    chunk = times.of_tokens(settings.chunk_tokens)
    if times.of_tokens(length) > chunk:
        return last

    def done(slot: int) -> int:
        rounds, rest = divmod(waiting[slot] + length, settings.chunk_tokens if slot == last else longest)
        return rounds * times.of_tokens(settings.chunk_tokens if slot == last else longest) + times.of_tokens(rest)

    return min(range(len(waiting)), key=lambda slot: (done(slot), slot))
