"""A rank's sequences that wait in one slot: what it offers, and what becomes of that. Pure: no clock, no threads.

A sequence is queued, then on offer until its last token is admitted. Once on offer it stays so, unless it is cancelled:
so its age counts, and what has begun always goes on.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pipemoe.errors import PlanError
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import MAX_CHUNKS, MOST_ROUNDS, Chunk


@dataclass(slots=True)
class _Sequence:
    length: int
    priority: int
    round: int  # of this slot, before which it came
    at: int = 0  # tokens admitted
    age: int = 0  # rounds in which it was offered in vain, since its last chunk
    is_cancelled: bool = False


class Settled(NamedTuple):
    """What a round did to this rank's sequences."""

    chunks: tuple[Chunk, ...]  # admitted, in the order of the plan
    ended: tuple[int, ...]  # of those, the sequences whose last chunk this is, or that were cancelled
    withdrawn: tuple[int, ...]  # cancelled while they were on offer, and not admitted: no round has them any more


class Waiting:
    """One rank's queue of one slot."""

    def __init__(self, slot: int, num_slots: int, settings: RollingSettings) -> None:
        self._longest = settings.longest_chunk(slot, num_slots)
        self._enough = 2 * settings.max_tokens_per_round  # tokens on offer: a round's, and some to choose from
        self._most = settings.most_rounds_waited
        self._round = 0
        self._queued: dict[int, _Sequence] = {}  # in the order in which they came
        self._shortest_first = settings.policy == "rolling"
        # heap of (-priority, tokens if they count, sequence), some no longer queued
        self._by_priority: list[tuple[int, int, int]] = []
        self._offered: dict[int, _Sequence] = {}
        self._under_way = False  # has a round been offered to, and not settled?
        self.waiting_tokens = 0  # all that is not admitted yet

    def __len__(self) -> int:
        """Sequences with tokens that are not admitted yet."""
        return len(self._queued) + len(self._offered)

    def add(self, sequence: int, length: int, priority: int = 0) -> None:
        """Queue a sequence; numbers grow. Its length has been checked: at least 1, and no longer than a chunk where
        sequences go whole.
        """
        self._queued[sequence] = _Sequence(length, priority, self._round)
        heapq.heappush(self._by_priority, (-priority, length if self._shortest_first else 0, sequence))
        self.waiting_tokens += length

    def cancel(self, sequence: int) -> bool:
        """Offer nothing more of a sequence. True: it is gone at once. False: it is on offer, and the next `settle` says
        what became of it; or this queue does not have it (any more).
        """
        found = self._queued.pop(sequence, None)
        if found is None and sequence in self._offered:
            if self._under_way:
                self._offered[sequence].is_cancelled = True
                return False
            found = self._offered.pop(sequence)
        if found is not None:
            self.waiting_tokens -= found.length - found.at
        return found is not None

    def offer(self, reserve: Callable[[int], bool] = lambda sequence: True) -> tuple[Chunk, ...]:
        """The chunks to offer to the next round; then `settle` must be called before the next `offer`.

        reserve(sequence): called once before a sequence is first offered, in the order in which they go. False: there
        is no memory yet, and nothing behind it is offered either.
        """
        if self._under_way:
            raise PlanError("a round is offered to while the one before is not settled")
        self._under_way = True
        tokens = sum(min(self._longest, s.length - s.at) for s in self._offered.values())
        while self._queued and len(self._offered) < MAX_CHUNKS and tokens < self._enough:
            sequence = self._next_queued()
            if not reserve(sequence):
                break
            self._offered[sequence] = found = self._queued.pop(sequence)
            tokens += min(self._longest, found.length)
        return tuple(
            Chunk(sequence, s.at, min(s.length, s.at + self._longest), s.length, min(s.age, MOST_ROUNDS), s.priority)
            for sequence, s in self._offered.items()
        )

    def _next_queued(self) -> int:
        """The sequence that has waited for too many rounds; else the first of the highest priority, or its shortest."""
        oldest = next(iter(self._queued))
        if self._round - self._queued[oldest].round >= self._most:
            return oldest
        while self._by_priority[0][-1] not in self._queued:
            heapq.heappop(self._by_priority)
        return self._by_priority[0][-1]

    def settle(self, admitted: tuple[Chunk, ...]) -> Settled:
        """A round has been agreed on; `admitted` are its chunks of this rank."""
        self._under_way = False
        self._round += 1
        ended = []
        for s in self._offered.values():
            s.age += 1
        for chunk in admitted:
            found = self._offered[chunk.sequence]
            self.waiting_tokens -= chunk.tokens
            found.at, found.age = chunk.stop, 0
            if chunk.is_last or found.is_cancelled:
                ended.append(chunk.sequence)
                self._forget(chunk.sequence)
        withdrawn = [sequence for sequence, s in self._offered.items() if s.is_cancelled]
        for sequence in withdrawn:
            self._forget(sequence)
        return Settled(admitted, tuple(ended), tuple(withdrawn))

    def _forget(self, sequence: int) -> None:
        found = self._offered.pop(sequence)
        self.waiting_tokens -= found.length - found.at
