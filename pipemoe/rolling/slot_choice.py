"""Which slot a sequence goes through, from the cost model and what already waits on this rank."""

from __future__ import annotations

from collections.abc import Sequence

from pipemoe.rolling.admission import RollingSettings


def choose_slot(length: int, waiting: Sequence[int], settings: RollingSettings) -> int:
    """The slot for a sequence of `length` tokens. waiting: tokens of this rank that wait in each slot.

    The last slot takes long sequences, chunk by chunk. A sequence is short if that slot would not cut it: if the best
    round for what waits there and the sequence holds it whole. So what is short depends on how much a round costs, and
    the longer the queue of long ones, the longer it may be. Of several short slots, the one with the least waiting
    takes it. A short sequence never takes the last slot, however empty: a long round may be under way there.
    """
    last = len(waiting) - 1
    work = settings.work(0, length)
    is_short = length <= (settings.max_tokens_per_round if settings.fixed_rows else settings.chunk_tokens)
    if last == 0 or not is_short or work > settings.best_work(work + waiting[last]):
        return last
    return min(range(last), key=lambda slot: (waiting[slot], slot))
