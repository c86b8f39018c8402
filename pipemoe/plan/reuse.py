"""When a wave may use a buffer that other ranks read: the waits that a transport over shared memory keeps.

Each rank has rows and partial sums of its own in each buffer of a slot, which the others read where they lie. The waves
of a slot are numbered, on all ranks alike. In each buffer every rank shows three numbers:

    sent        the last wave whose rows of this rank lie there
    summed      the last wave whose partial sums lie there; then this rank has also read all rows of that wave
    combined    the last wave whose sums this rank has added up, of those in which it has rows

`prove_reuse` proves that no reader can be overtaken when every rank keeps these waits, in whatever order the ranks run
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pipemoe.errors import PlanError
from pipemoe.plan.schedule import OpKind, Plan


class Use(NamedTuple):
    """A wave's use of a buffer. Wave 0 never was: nobody waits for it."""

    number: int  # of the wave in its slot
    owners: tuple[int, ...]  # ranks with rows in the wave; its rows are there when all of these have sent it
    before: int  # the wave that had the buffer: rows may be written when every rank has summed it
    owners_before: tuple[int, ...]  # and sums may be written when these have combined it


class BufferUses:
    """Numbers the waves of every slot, and remembers which one a buffer had last."""

    def __init__(self, num_slots: int, num_buffers: int) -> None:
        self._numbers = [0] * num_slots
        self._last: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {
            (slot, buffer): (0, ()) for slot in range(num_slots) for buffer in range(num_buffers)
        }

    def next(self, slot: int, buffer: int, owners: tuple[int, ...]) -> Use:
        self._numbers[slot] += 1
        use = Use(self._numbers[slot], owners, *self._last[slot, buffer])
        self._last[slot, buffer] = use.number, owners
        return use


SENT, SUMMED, COMBINED = range(3)  # flags, see above; also the events that raise them
_ATTENDED = 3
_NAMES = ("write of rows", "experts", "sum", "attention")
_Event = tuple[int, int, tuple]  # of a rank: kind, and what it is for: a wave's use of a buffer, or an attention


def prove_reuse(plan: Plan, new_uses: Callable[[int, int], BufferUses] = BufferUses) -> None:
    """Raise PlanError unless, by the waits of `new_uses` alone, every rank overwrites rows and partial sums only after
    their last reader, and no rank waits for ever.

    A rank runs a slot's computations in the plan's order, and its sums in the plan's order, and otherwise as it likes.
    An event's clock says how far each of these 2 R queues must be when it happens.
    """
    for slot in sorted({cohort.slot for cohort in plan.cohorts}):
        _Proof(plan, slot, new_uses).run()


class _Proof:
    """Of one slot."""

    def __init__(self, plan: Plan, slot: int, new_uses: Callable[[int, int], BufferUses]) -> None:
        self._plan, self._slot, self._num_ranks = plan, slot, plan.facts.num_ranks
        uses = new_uses(plan.config.max_slots, plan.config.num_buffers)
        self._queues: list[list[_Event]] = [[] for _ in range(2 * self._num_ranks)]  # computations, then sums
        self._waits: dict[tuple[int, _Event], list[tuple[int, _Event]]] = {}  # by queue and event: queue and event
        self._raised: dict[tuple[int, int, int], list[tuple[int, _Event]]] = {}  # by rank, flag, buffer: number, event
        self._written: list[tuple[tuple[int, _Event], list[tuple[int, _Event]]]] = []  # and all who read what was there
        self._fill(uses)

    def _fill(self, uses: BufferUses) -> None:
        """Everything that each rank does for this slot's cohorts, and what the protocol makes it wait for."""
        plan, num_ranks = self._plan, self._num_ranks
        of_wave: dict[tuple[int, int, int], Use] = {}
        readers: dict[tuple[int, int], list[tuple[int, _Event]]] = {}  # by flag and buffer
        wanted: list[tuple[int, _Event, list[tuple[int, int, int, int]]]] = []  # rank, flag, buffer, number
        event: _Event
        for op in plan.ops:
            cohort = plan.cohorts[op.cohort]
            if cohort.slot != self._slot or op.kind is OpKind.FINISH:
                continue
            place = op.cohort, op.layer, op.wave
            if op.kind is OpKind.ATTEND:
                for rank in range(num_ranks):
                    attention: _Event = (_ATTENDED, 0, place)
                    self._queues[rank].append(attention)
                    if op.layer and cohort.tokens_of(rank):
                        waves = [(w, of_wave[op.cohort, op.layer - 1, w]) for w in range(len(cohort.waves))]
                        self._waits[rank, attention] = [
                            (num_ranks + rank, (COMBINED, plan.buffer(op.cohort, op.layer - 1, w), (use.number,)))
                            for w, use in waves
                            if rank in use.owners
                        ]
                continue
            buffer = plan.buffer(*place)
            if op.kind is OpKind.DISPATCH:
                owners = tuple(sorted(cohort.waves[op.wave].ranks()))
                of_wave[place] = use = uses.next(self._slot, buffer, owners)
                for rank in owners:
                    event = (SENT, buffer, (use.number,))
                    self._raise(rank, rank, event)
                    wanted.append((rank, event, [(q, SUMMED, buffer, use.before) for q in range(num_ranks)]))
                    self._written.append(((rank, event), list(readers.get((SENT, buffer), []))))
            elif op.kind is OpKind.EXPERTS:
                use = of_wave[place]
                for rank in range(num_ranks):
                    event = (SUMMED, buffer, (use.number,))
                    self._raise(rank, rank, event)
                    needs = [(q, SENT, buffer, use.number) for q in use.owners]
                    wanted.append((rank, event, needs + [(q, COMBINED, buffer, use.before) for q in use.owners_before]))
                    self._written.append(((rank, event), list(readers.get((SUMMED, buffer), []))))
                    readers.setdefault((SENT, buffer), []).append((rank, event))
            else:
                use = of_wave[place]
                for rank in use.owners:
                    event = (COMBINED, buffer, (use.number,))
                    self._raise(rank, num_ranks + rank, event)
                    wanted.append(
                        (num_ranks + rank, event, [(q, SUMMED, buffer, use.number) for q in range(num_ranks)])
                    )
                    readers.setdefault((SUMMED, buffer), []).append((num_ranks + rank, event))
        for queue, event, needs in wanted:
            self._waits[queue, event] = [source for need in needs for source in self._first_raise(event, *need)]

    def _raise(self, rank: int, queue: int, event: _Event) -> None:
        self._queues[queue].append(event)
        kind, buffer, (number,) = event
        self._raised.setdefault((rank, kind, buffer), []).append((number, event))

    def _first_raise(
        self, event: _Event, rank: int, flag: int, buffer: int, number: int
    ) -> Iterator[tuple[int, _Event]]:
        """The event from which on a flag of `rank` has at least this number."""
        if number == 0:
            return
        queue = self._num_ranks * (flag == COMBINED) + rank
        for raised, source in self._raised.get((rank, flag, buffer), []):
            if raised >= number:
                yield queue, source
                return
        self._fail(f"{_name(event)} waits for {_NAMES[flag]} of wave {number} on rank {rank}, which never comes")

    def run(self) -> None:
        """Let every queue go on as far as its waits allow, and note each event's clock; then look at all writes."""
        places = [{event: at for at, event in enumerate(queue, 1)} for queue in self._queues]
        clocks: dict[tuple[int, _Event], np.ndarray] = {}
        now = [np.zeros(len(self._queues), np.int64) for _ in self._queues]
        moves = True
        while moves:
            moves = False
            for queue, events in enumerate(self._queues):
                for event in events[now[queue][queue] :]:
                    waits = self._waits.get((queue, event), [])
                    if any(source not in clocks for source in waits):
                        break
                    clock = np.maximum.reduce([now[queue], *(clocks[source] for source in waits)])
                    clock[queue] = places[queue][event]
                    now[queue] = clocks[queue, event] = clock
                    moves = True
        for queue, events in enumerate(self._queues):
            if now[queue][queue] < len(events):
                self._fail(f"rank {queue % self._num_ranks} waits for ever: {_name(events[now[queue][queue]])}")
        for write, readers in self._written:
            for queue, read in readers:
                if clocks[write][queue] < places[queue][read]:
                    rank, reader = write[0] % self._num_ranks, queue % self._num_ranks
                    self._fail(f"{_name(write[1])} on rank {rank} may overtake {_name(read)} on rank {reader}")

    def _fail(self, text: str) -> None:
        raise PlanError(f"buffers are free across ranks: slot {self._slot}: {text}")


def _name(event: _Event) -> str:
    kind, buffer, what = event
    if kind == _ATTENDED:
        return f"attention of cohort {what[0]} in layer {what[1]}"
    return f"{_NAMES[kind]} of wave {what[0]} in buffer {buffer}"
