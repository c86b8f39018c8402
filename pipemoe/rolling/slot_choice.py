"""Which slot a sequence goes through, from the cost model and what already waits on this rank."""

from __future__ import annotations

from collections.abc import Sequence

from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.round_time import RoundTime


def choose_slot(length: int, waiting: Sequence[int], settings: RollingSettings, times: RoundTime) -> int:
    """The slot for a sequence of `length` tokens. waiting: tokens of this rank that wait or run in each slot.

    The last slot takes long sequences, chunk by chunk. A sequence goes through a shorter slot if it fits in one of its
    rounds, and such a round takes no longer than a round with one full chunk: or whoever comes after it would wait for
    longer than in the long slot. Of the shorter slots it takes the one where it is predicted to be done first. It never
    waits in the last slot, even if that would be sooner: there it would depend on whatever holds up a long sequence, of
    whichever rank. Each rank chooses for its own sequences; the others learn of it by its offers.
    """
    last = len(waiting) - 1
    longest = min(settings.max_tokens_per_round, settings.short_round_rows or settings.max_tokens_per_round)
    if last == 0 or length > longest:
        return last
    chunk = times.of_tokens(settings.chunk_tokens)
    if times.of_tokens(length) > chunk:
        return last

    def done(slot: int) -> int:
        rounds, rest = divmod(waiting[slot] + length, longest)
        return rounds * times.of_tokens(longest) + times.of_tokens(rest)

    return min(range(last), key=lambda slot: (done(slot), slot))
