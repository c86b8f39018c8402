"""A simulated world of ranks that roll: one clock, messages that are late, lost or doubled, and no threads.

It plays the part of the runtime: it asks SlotRounds when to post, moves the offers, runs what is admitted, and tells
the ranks of one another's levels. Every delay comes from a list that a test chooses, over and over.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import NamedTuple

from pipemoe.rolling.admission import Admission, RollingSettings
from pipemoe.rolling.offer import Offer, decode_offers, encode_offer
from pipemoe.rolling.rounds import SlotRounds, When
from pipemoe.rolling.verify import Round
from pipemoe.rolling.waiting import Queue, Waiting

HEARTBEAT = 40  # ticks
MOST_LOST = 3  # wake-ups in a row, from one rank to another
FINGERPRINT = b"f" * 16


class Request(NamedTuple):
    at: int  # the tick at which it is submitted
    rank: int
    length: int
    priority: int = 0
    cancelled_after: int | None = None  # ticks


@dataclass
class Slot:
    """One slot on one rank."""

    admission: Admission
    waiting: Waiting
    rounds: SlotRounds = field(default_factory=SlotRounds)
    to_run: list[int] = field(default_factory=list)  # rounds admitted and not finished
    began: int = 0  # when the first of them began
    asked: bool = False  # is a post scheduled?


class Standstill(AssertionError):
    pass


class SimulatedWorld:
    def __init__(
        self,
        num_ranks: int,
        num_slots: int,
        settings: RollingSettings,
        delays: Sequence[int] = (1,),
        fates: Sequence[int] = (1,),  # of each wake-up: how often it arrives
        predicted: int = 5,  # ticks of a round
        durations: Callable[[int, int], int] = lambda slot, number: 5,  # ticks of a round, on its slowest rank
        patience: int = 0,  # ticks for which offers are patient
    ) -> None:
        self.num_ranks, self.num_slots, self.settings = num_ranks, num_slots, settings
        self._delays, self._fates = cycle(delays), cycle(fates)
        self._predicted, self._durations, self._patience = predicted, durations, patience
        self.now = 0
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self.queues = [Queue(settings) for _ in range(num_ranks)]
        self.ranks = [
            [
                Slot(Admission(slot, num_slots, num_ranks, settings), Waiting(slot, num_slots, settings, queue))
                for slot in range(num_slots)
            ]
            for queue in self.queues
        ]
        self.is_closing = [False] * num_ranks
        self.history: list[Round] = []
        self.cancelled: set[tuple[int, int]] = set()
        self.done: dict[tuple[int, int], int] = {}  # (rank, sequence): the tick at which its last round ended
        self.given_back: list[tuple[int, int]] = []  # what settle said has ended
        self._offers: dict[tuple[int, int], dict[int, bytes]] = {}  # of a slot's round, by rank
        self._admitted: dict[tuple[int, int], tuple] = {}
        self._ready: dict[tuple[int, int], set[int]] = {}  # the ranks that have begun to run it
        self._next_sequence = [0] * num_ranks
        self._lost: dict[tuple[int, int, int], int] = {}
        self._since: dict[tuple[int, int], int] = {}

    # What a test asks for.

    def submit(self, request: Request) -> None:
        self._at(request.at, lambda: self._submit(request))

    def close(self, rank: int, at: int) -> None:
        def close() -> None:
            self.is_closing[rank] = True
            self._look(rank)

        self._at(at, close)

    def run(self, most_events: int = 1_000_000) -> None:
        """Until all slots have ended on all ranks. Raises Standstill if they do not."""
        for rank in range(self.num_ranks):
            self._beat(rank)
        for _ in range(most_events):
            if not self._events:
                break
            self.now, _, event = heapq.heappop(self._events)
            event()
        if not all(slot.rounds.has_ended for of_rank in self.ranks for slot in of_rank):
            raise Standstill([[vars(slot.rounds) for slot in of_rank] for of_rank in self.ranks])

    # The world.

    def _at(self, tick: int, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (tick, self._count, event))

    def _after(self, ticks: int, event: Callable[[], None]) -> None:
        self._at(self.now + ticks, event)

    def _submit(self, request: Request) -> None:
        rank = request.rank
        if self.is_closing[rank]:
            return
        sequence = self._next_sequence[rank]
        self._next_sequence[rank] += 1
        self._since[rank, sequence] = self.now
        self.queues[rank].add(sequence, request.length, request.priority)
        if request.cancelled_after is not None:
            self._after(request.cancelled_after, lambda: self._cancel(rank, sequence))
        self._look(rank)

    def _cancel(self, rank: int, sequence: int) -> None:
        if (rank, sequence) not in self.given_back:
            self.cancelled.add((rank, sequence))
            places = self.queues[rank], *(slot.waiting for slot in self.ranks[rank])
            if any(place.cancel(sequence) for place in places):
                self.given_back.append((rank, sequence))
            self._look(rank)

    def _beat(self, rank: int) -> None:
        if not all(slot.rounds.has_ended for slot in self.ranks[rank]):
            for index in range(self.num_slots):
                self._tell(rank, index)
            self._after(HEARTBEAT, lambda: self._beat(rank))

    def _tell(self, rank: int, index: int) -> None:
        level = self.ranks[rank][index].rounds.posted
        for other in range(self.num_ranks):
            lost = self._lost.get((rank, other, index), 0)
            copies = max(next(self._fates), lost >= MOST_LOST)
            self._lost[rank, other, index] = 0 if copies else lost + 1
            for _ in range(copies):
                self._after(next(self._delays), lambda other=other: self._hear(other, index, level))

    def _hear(self, rank: int, index: int, level: int) -> None:
        self.ranks[rank][index].rounds.hear(level)
        self._look(rank)

    def _look(self, rank: int) -> None:
        """What the runtime's loop does after any event."""
        for index, slot in enumerate(self.ranks[rank]):
            when = self._when(rank, slot)
            if when is not When.NOT_YET and not slot.asked:
                slot.asked = True
                ticks = {When.NOW: 0, When.LATE: next(self._delays), When.AFTER_PAUSE: 2}[when]
                self._after(ticks, lambda index=index: self._post(rank, index))

    def _when(self, rank: int, slot: Slot) -> When:
        return slot.rounds.when(slot.waiting.has_work, self.is_closing[rank] and not slot.waiting.may_have_work)

    def _post(self, rank: int, index: int) -> None:
        slot = self.ranks[rank][index]
        slot.asked = False
        if self._when(rank, slot) is When.NOT_YET:
            return
        chunks = slot.waiting.offer()
        waited = max((self.now - self._since[rank, c.sequence] for c in chunks), default=0)
        tokens = sum(c.tokens for c in chunks)
        offer = Offer(
            chunks,
            tuple((self.now - s.began) * 1000 // self._predicted if s.to_run else 0 for s in self.ranks[rank]),
            slot.waiting.waiting_tokens - tokens,
            self.is_closing[rank] and not slot.waiting.may_have_work,
            waited < self._patience,
        )
        number = slot.rounds.post(offer)
        offers = self._offers.setdefault((index, number), {})
        assert rank not in offers
        offers[rank] = encode_offer(FINGERPRINT, offer)
        self._tell(rank, index)
        if len(offers) == self.num_ranks:
            for other in range(self.num_ranks):
                self._after(next(self._delays), lambda other=other: self._agree(other, index, number))

    def _agree(self, rank: int, index: int, number: int) -> None:
        slot = self.ranks[rank][index]
        offers = decode_offers([self._offers[index, number][r] for r in range(self.num_ranks)])
        admitted = slot.admission.admit(offers)
        if (index, number) not in self._admitted:
            self._admitted[index, number] = admitted
            self.history.append(Round(index, tuple(offers), admitted))
        assert self._admitted[index, number] == admitted
        settled = slot.waiting.settle(admitted[rank])
        self.given_back += [(rank, sequence) for sequence in (*settled.ended, *settled.withdrawn)]
        if slot.rounds.agree(offers, admitted):
            slot.to_run.append(number)
            if len(slot.to_run) == 1:
                self._begin(rank, index)
        self._look(rank)

    def _begin(self, rank: int, index: int) -> None:
        """A round ends on a rank some time after it has begun on all."""
        slot = self.ranks[rank][index]
        number, slot.began = slot.to_run[0], self.now
        slot.waiting.begin(self._admitted[index, number])
        ready = self._ready.setdefault((index, number), set())
        ready.add(rank)
        if len(ready) == self.num_ranks:
            ticks = self._durations(index, number)
            for other in range(self.num_ranks):
                self._after(max(1, ticks - next(self._delays)), lambda other=other: self._finish(other, index, number))

    def _finish(self, rank: int, index: int, number: int) -> None:
        slot = self.ranks[rank][index]
        assert slot.to_run.pop(0) == number
        slot.rounds.finish()
        slot.waiting.end()
        for chunk in self._admitted[index, number][rank]:
            if chunk.is_last:
                self.done[rank, chunk.sequence] = self.now
        if slot.to_run:
            self._begin(rank, index)
        self._look(rank)
