"""A rank's sequences that wait: in a queue that all its slots share, and then on offer in one slot. Pure: no clock, no
threads.

A sequence is queued until a slot that has room for it makes its next offer, then on offer there until its last token is
admitted. Once on offer it stays so, unless it is cancelled: so its age counts, and what has begun always goes on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipemoe.errors import PlanError
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import MAX_CHUNKS, MOST_ROUNDS, MOST_TOKENS, Chunk


@dataclass(slots=True)
class _Sequence:
    length: int
    priority: int
    round: int  # of any slot, before which it came
    at: int = 0  # tokens admitted
    age: int = 0  # rounds in which it was offered in vain, since its last chunk
    is_cancelled: bool = False


class Settled(NamedTuple):
    """What a round did to this rank's sequences."""

    chunks: tuple[Chunk, ...]  # admitted, in the order of the plan
    ended: tuple[int, ...]  # of those, the sequences whose last chunk this is, or that were cancelled
    withdrawn: tuple[int, ...]  # cancelled while they were on offer, and not admitted: no round has them any more


class Queue:
    """One rank's sequences that no slot has on offer yet. Which slot takes one is decided when a slot can: nobody waits
    in front of a busy slot while another is free, and open to it. Here a rank's slots also see of one another what
    opens the shorter ones.
    """

    def __init__(self, settings: RollingSettings) -> None:
        self._settings = settings
        self._shortest_first = settings.policy == "rolling"
        self._sequences: dict[int, _Sequence] = {}  # in the order in which they came
        self._order: list[tuple[int, int, int]] = []  # -priority, tokens if they count, sequence
        self._lengths: list[int] = []  # sorted
        self._round = 0
        self.tokens = 0
        self.round_work: dict[int, int] = {}  # by slot, of the round under way, for the rank that has most, in rows
        self.full: set[int] = set()  # slots that had no memory for a sequence when they made their last offer

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: int, length: int, priority: int = 0) -> None:
        """Queue a sequence; numbers grow. Its length has been checked: at least 1, and no longer than a round where
        sequences go whole.
        """
        self._sequences[sequence] = _Sequence(length, priority, self._round)
        insort(self._order, self._key(sequence))
        insort(self._lengths, length)
        self.tokens += length

    def cancel(self, sequence: int) -> bool:
        """False: it is on offer, or nowhere (any more)."""
        return sequence in self._sequences and self._remove(sequence) is not None

    def has_any(self, most: int) -> bool:
        """Is there a sequence of at most so many tokens?"""
        return bool(self._lengths) and self._lengths[0] <= most

    def next_of(self, most: int) -> int | None:
        """Of those of at most so many tokens, the one that has waited for too many rounds; else the first of the
        highest priority, or its shortest. None: there is none.
        """
        if not self.has_any(most):
            return None
        for sequence, found in self._sequences.items():
            if self._round - found.round < self._settings.most_rounds_waited:
                break
            if found.length <= most:
                return sequence
        fitting = (key[-1] for key in self._order if self._sequences[key[-1]].length <= most)
        return next(fitting, None)

    def first_beyond(self, tokens: int) -> int | None:
        """Of those of more than so many tokens, the first of the highest priority, or its shortest."""
        if not self._lengths or self._lengths[-1] <= tokens:
            return None
        return next(key[-1] for key in self._order if self._sequences[key[-1]].length > tokens)

    def look(self, sequence: int) -> _Sequence:
        """It stays here."""
        return self._sequences[sequence]

    def take(self, sequence: int) -> _Sequence:
        """It goes on offer."""
        return self._remove(sequence)

    def count_round(self) -> None:
        """A slot's round has been agreed on."""
        self._round += 1

    def _key(self, sequence: int) -> tuple[int, int, int]:
        found = self._sequences[sequence]
        return -found.priority, found.length if self._shortest_first else 0, sequence

    def _remove(self, sequence: int) -> _Sequence:
        del self._order[bisect_left(self._order, self._key(sequence))]
        found = self._sequences.pop(sequence)
        del self._lengths[bisect_left(self._lengths, found.length)]
        self.tokens -= found.length
        return found


class Waiting:
    """What one slot has on offer, and may have: of one rank."""

    def __init__(self, slot: int, num_slots: int, settings: RollingSettings, queue: Queue) -> None:
        """queue: of the rank's slots."""
        self._settings, self._slot, self._num_slots, self._queue = settings, slot, num_slots, queue
        self._takes_all = slot == num_slots - 1
        self._longest = settings.longest_chunk(slot, num_slots)
        self._offered: dict[int, _Sequence] = {}
        self._under_way = False  # has a round been offered to, and not settled?
        self._tokens = 0  # of what is on offer, not admitted yet

    @property
    def has_work(self) -> bool:
        """Is there anything to offer?"""
        return bool(self._offered) or self._queue.has_any(self._most_tokens())

    @property
    def may_have_work(self) -> bool:
        """Is there anything to offer, or could there be beside a longer round? Once a rank adds nothing more, False is
        for good.
        """
        return bool(self._offered) or self._queue.has_any(self._longest_ever())

    @property
    def num_offered(self) -> int:
        """Sequences that are on offer here."""
        return len(self._offered)

    @property
    def waiting_tokens(self) -> int:
        """Not admitted yet: on offer here, and in the queue, even if another slot will take them."""
        return self._tokens + self._queue.tokens

    def cancel(self, sequence: int) -> bool:
        """Offer nothing more of a sequence. True: it is gone at once. False: a round is under way to which it is
        offered, and the next `settle` says what became of it; or this slot does not have it (any more).
        """
        found = self._offered.get(sequence)
        if found is None:
            return False
        if self._under_way:
            found.is_cancelled = True
            return False
        self._forget(sequence)
        return True

    def offer(self, reserve: Callable[[int], bool] = lambda sequence: True) -> tuple[Chunk, ...]:
        """The chunks to offer to the next round; then `settle` must be called before the next `offer`.

        reserve(sequence): called before a sequence is first offered, in the order in which they go. False: there is no
        memory yet, and nothing behind it is offered either.
        """
        if self._under_way:
            raise PlanError("a round is offered to while the one before is not settled")
        self._under_way = True
        self._queue.full.discard(self._slot)
        enough, most = self._settings.most_on_offer(self.waiting_tokens, self._num_slots), self._most_tokens()
        tokens = sum(min(self._longest, s.length - s.at) for s in self._offered.values())
        while len(self._offered) < MAX_CHUNKS:
            sequence = self._queue.next_of(most) if tokens < enough else self._next_before_all()
            if sequence is None:
                break
            if not reserve(sequence):
                self._queue.full.add(self._slot)
                break
            self._offered[sequence] = found = self._queue.take(sequence)
            self._tokens += found.length
            tokens += min(self._longest, found.length)
        return tuple(
            Chunk(sequence, s.at, min(s.length, s.at + self._longest), s.length, min(s.age, MOST_ROUNDS), s.priority)
            for sequence, s in self._offered.items()
        )

    def _next_before_all(self) -> int | None:
        """Of what no other slot may take, the first, if it goes before all that is on offer here: it need not wait for
        longer sequences, or such of lower priority, to pass chunk by chunk.
        """
        settings = self._settings
        if not self._takes_all or settings.policy != "rolling":
            return None
        # Others that are closed now and then cannot be relied on.
        takes_alone = self._num_slots == 1 or settings.beside_rows
        sequence = self._queue.first_beyond(0 if takes_alone else settings.longest_short(self._queue.tokens))
        if sequence is None:
            return None
        first = min(map(self._place, self._offered.values()))
        return sequence if self._place(self._queue.look(sequence)) < first else None

    def _place(self, found: _Sequence) -> tuple[int, int]:
        """What is less goes first. Ages aside, as admission has it."""
        return -found.priority, self._settings.work(found.at, found.length)

    def _most_tokens(self) -> int:
        """Of a sequence that this slot may take from the queue now; 0: it takes none."""
        return self._longest_ever() if self._takes_all or self._is_open() else 0

    def _longest_ever(self) -> int:
        """Of a sequence that this slot may take from the queue, whatever longer slots do."""
        return MOST_TOKENS if self._takes_all else self._settings.longest_short(self._queue.tokens)

    def _is_open(self) -> bool:
        """Is a longer slot's round so long that short sequences should pass beside it, or its memory full?"""
        longer = (work for slot, work in self._queue.round_work.items() if slot > self._slot)
        is_full = any(slot > self._slot for slot in self._queue.full)
        return is_full or max(longer, default=0) >= self._settings.beside_rows

    def begin(self, admitted: Sequence[Sequence[Chunk]]) -> None:
        """A round of this slot begins. admitted: the chunks of each rank."""
        work = self._settings.work
        self._queue.round_work[self._slot] = max(sum(work(c.start, c.stop) for c in of) for of in admitted)

    def end(self) -> None:
        """The round that has begun is over."""
        self._queue.round_work.pop(self._slot, None)

    def settle(self, admitted: tuple[Chunk, ...]) -> Settled:
        """A round has been agreed on; `admitted` are its chunks of this rank."""
        self._under_way = False
        self._queue.count_round()
        ended = []
        for s in self._offered.values():
            s.age += 1
        for chunk in admitted:
            found = self._offered[chunk.sequence]
            self._tokens -= chunk.tokens
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
        self._tokens -= found.length - found.at
