"""Which slot a sequence goes through, from the cost model and what already waits on this rank."""

from __future__ import annotations

from collections.abc import Sequence

from pipemoe.rolling.admission import RollingSettings


def choose_slot(length: int, waiting: Sequence[int], settings: RollingSettings) -> int:
    """The slot for a sequence of `length` tokens. waiting: tokens of this rank that wait in each slot.

    The last slot takes long sequences, chunk by chunk. A sequence is short if it costs no more than a round by itself,
    or than what waits in that slot: so what is short depends on how much a round costs, and the longer the queue of
    long ones, the longer it may be. Of several short slots, the one with the least waiting takes it. A short sequence
    never takes the last slot, however empty: a long round may be under way there.
    """
    last = len(waiting) - 1
    if settings.fixed_rows:
        is_short = length <= settings.max_tokens_per_round and (
            settings.work(0, length) <= max(settings.fixed_rows, waiting[last])
        )
    else:
        is_short = length <= settings.chunk_tokens
    if last == 0 or not is_short:
        return last
    return min(range(last), key=lambda slot: (waiting[slot], slot))
