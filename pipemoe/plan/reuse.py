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

from collections.abc import Callable, Iterable, Iterator, Sequence
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


# Flags, see above, and the events that raise them; then messages of rows and of sums between hosts: all of a wave that
# go to or from a rank have been posted, or have arrived.
SENT, SUMMED, COMBINED, _ROWS_POSTED, _ROWS_MOVED, _SUMS_POSTED, _SUMS_MOVED, _ATTENDED = range(8)
_NAMES = (
    *("write of rows", "experts", "sum", "message of rows", "arrival of rows", "message of sums", "arrival of sums"),
    "attention",
)
# A rank's queues: computations, sums, and of messages those to post and those to arrive.
_QUEUE_OF = {
    SENT: 0,
    SUMMED: 0,
    _ATTENDED: 0,
    COMBINED: 1,
    _ROWS_POSTED: 2,
    _ROWS_MOVED: 3,
    _SUMS_POSTED: 4,
    _SUMS_MOVED: 5,
}
_NUM_QUEUES = 6
_Event = tuple[int, int, tuple]  # of a rank: kind, and what it is for: a wave's use of a buffer, or an attention
_Need = tuple[int, int, int, int]  # rank, kind, buffer, number of a wave


def prove_reuse(
    plan: Plan, new_uses: Callable[[int, int], BufferUses] = BufferUses, hosts: Sequence[int] | None = None
) -> None:
    """Raise PlanError unless, by the waits of `new_uses` alone, every rank reads rows and partial sums only once they
    have been written, and overwrites them only after their last reader, and no rank waits for ever.

    hosts: the number of every rank's host; None for one host. Ranks of one host share memory. Others send messages,
    each of which arrives once it has been posted at both ends.

    A rank runs a slot's computations in the plan's order, and its sums in the plan's order, and posts messages in the
    plan's order, and otherwise does as it likes. An event's clock says how far each of these queues must be when it
    happens.
    """
    for slot in sorted({cohort.slot for cohort in plan.cohorts}):
        _Proof(plan, slot, new_uses, hosts or [0] * plan.facts.num_ranks).run()


class _Proof:
    """Of one slot."""

    def __init__(self, plan: Plan, slot: int, new_uses: Callable[[int, int], BufferUses], hosts: Sequence[int]) -> None:
        self._plan, self._slot, self._num_ranks = plan, slot, plan.facts.num_ranks
        uses = new_uses(plan.config.max_slots, plan.config.num_buffers)
        ranks = range(self._num_ranks)
        self._here = [[q for q in ranks if hosts[q] == hosts[r]] for r in ranks]
        self._others = [[q for q in ranks if hosts[q] != hosts[r]] for r in ranks]
        self._queues: list[list[_Event]] = [[] for _ in range(_NUM_QUEUES * self._num_ranks)]
        self._waits: dict[tuple[int, _Event], list[tuple[int, _Event]]] = {}  # by queue and event: queue and event
        self._raised: dict[tuple[int, int, int], list[tuple[int, _Event]]] = {}  # by rank, kind, buffer: number, event
        self._wanted: list[tuple[int, _Event, list[_Need]]] = []
        # By memory: whose it is, of what kind (named by the event that writes it), in which buffer.
        self._readers: dict[tuple[int, int, int], list[tuple[int, _Event]]] = {}
        self._written: list[tuple[tuple[int, _Event], list[tuple[int, _Event]]]] = []  # and all who read what was there
        self._read_of: list[
            tuple[tuple[int, _Event], tuple[int, _Event]]
        ] = []  # a reader, and who writes what it reads
        self._fill(uses)

    def _add(self, rank: int, kind: int, buffer: int, number: int, needs: list[_Need]) -> _Event:
        """An event of a rank, which comes when all `needs` have."""
        event: _Event = (kind, buffer, (number,))
        self._queues[self._queue(rank, kind)].append(event)
        self._raised.setdefault((rank, kind, buffer), []).append((number, event))
        self._wanted.append((rank, event, needs))
        return event

    def _queue(self, rank: int, kind: int) -> int:
        return self._num_ranks * _QUEUE_OF[kind] + rank

    def _write(self, rank: int, event: _Event) -> None:
        """It overwrites the memory of its kind in its buffer."""
        kind, buffer, _ = event
        readers = list(self._readers.get((rank, kind, buffer), []))
        self._written.append(((self._queue(rank, kind), event), readers))

    def _read(self, rank: int, event: _Event, memory: int, owners: Iterable[int]) -> None:
        """It reads what the `owners` have of its wave in their memory of this kind."""
        kind, buffer, wave = event
        read = self._queue(rank, kind), event
        filled = memory + 1 if memory in (_ROWS_POSTED, _SUMS_POSTED) else memory
        for owner in owners:
            self._readers.setdefault((owner, memory, buffer), []).append(read)
            self._read_of.append((read, (self._queue(owner, filled), (filled, buffer, wave))))

    def _fill(self, uses: BufferUses) -> None:
        """Everything that each rank does for this slot's cohorts, and what the protocol makes it wait for."""
        plan, ranks = self._plan, range(self._num_ranks)
        of_wave: dict[tuple[int, int, int], Use] = {}
        # By rank and buffer, of its last wave: the arrival of sums, if there was one; the rank's own sum, or else that.
        moved: dict[tuple[int, int], _Need] = {}
        ends: dict[tuple[int, int], _Need] = {}
        for op in plan.ops:
            cohort = plan.cohorts[op.cohort]
            if cohort.slot != self._slot or op.kind is OpKind.FINISH:
                continue
            place = op.cohort, op.layer, op.wave
            if op.kind is OpKind.ATTEND:
                for rank in ranks:
                    attention: _Event = (_ATTENDED, 0, place)
                    self._queues[rank].append(attention)
                    if op.layer and cohort.tokens_of(rank):
                        waves = [(w, of_wave[op.cohort, op.layer - 1, w]) for w in range(len(cohort.waves))]
                        self._waits[rank, attention] = [
                            (
                                self._queue(rank, COMBINED),
                                (COMBINED, plan.buffer(op.cohort, op.layer - 1, w), (use.number,)),
                            )
                            for w, use in waves
                            if rank in use.owners
                        ]
                continue
            buffer = plan.buffer(*place)
            if op.kind is OpKind.DISPATCH:
                owners = tuple(sorted(cohort.waves[op.wave].ranks()))
                of_wave[place] = use = uses.next(self._slot, buffer, owners)
                for rank in use.owners:
                    needs = [(q, SUMMED, buffer, use.before) for q in self._here[rank]]
                    self._write(rank, self._add(rank, SENT, buffer, use.number, needs))
                for rank in ranks:
                    needs = [(rank, SUMMED, buffer, use.before)] + self._own(rank, SENT, buffer, use)
                    arrived = self._messages(rank, _ROWS_POSTED, buffer, use, needs)
                    if arrived is not None and rank in use.owners:
                        self._read(rank, arrived, SENT, [rank])
            elif op.kind is OpKind.EXPERTS:
                use = of_wave[place]
                for rank in ranks:
                    here = self._here[rank]
                    needs = [(q, SENT, buffer, use.number) for q in use.owners if q in here]
                    needs += [(q, COMBINED, buffer, use.before) for q in use.owners_before if q in here]
                    if self._has_messages(rank, use):
                        needs.append((rank, _ROWS_MOVED, buffer, use.number))
                    needs += [moved[rank, buffer]] if (rank, buffer) in moved else []
                    event = self._add(rank, SUMMED, buffer, use.number, needs)
                    self._write(rank, event)
                    self._read(rank, event, SENT, here)
                    self._read(rank, event, _ROWS_POSTED, [rank])
            else:
                use = of_wave[place]
                for rank in ranks:
                    needs = [(rank, SUMMED, buffer, use.number)]
                    needs += [ends[rank, buffer]] if (rank, buffer) in ends else []
                    arrived = self._messages(rank, _SUMS_POSTED, buffer, use, needs)
                    for last in (ends, moved):
                        last.pop((rank, buffer), None)
                    if arrived is not None:
                        self._read(rank, arrived, SUMMED, [rank])
                        ends[rank, buffer] = moved[rank, buffer] = rank, _SUMS_MOVED, buffer, use.number
                for rank in use.owners:
                    needs = [(q, SUMMED, buffer, use.number) for q in self._here[rank]]
                    needs += [moved[rank, buffer]] if (rank, buffer) in moved else []
                    event = self._add(rank, COMBINED, buffer, use.number, needs)
                    ends[rank, buffer] = rank, COMBINED, buffer, use.number
                    self._read(rank, event, SUMMED, self._here[rank])
                    self._read(rank, event, _SUMS_POSTED, [rank])
        for rank, event, needs in self._wanted:
            waits = [source for need in needs for source in self._first_raise(event, *need)]
            self._waits[self._queue(rank, event[0]), event] = waits

    def _own(self, rank: int, kind: int, buffer: int, use: Use) -> list[_Need]:
        return [(rank, kind, buffer, use.number)] if rank in use.owners else []

    def _has_messages(self, rank: int, use: Use) -> bool:
        """To other hosts, for it has rows in the wave, or from them."""
        return bool(self._others[rank]) and (rank in use.owners or any(q in use.owners for q in self._others[rank]))

    def _messages(self, rank: int, posted: int, buffer: int, use: Use, needs: list[_Need]) -> _Event | None:
        """The messages of a wave, to and from a rank, which writes where they go to; the event of their arrival."""
        if not self._has_messages(rank, use):
            return None
        self._write(rank, self._add(rank, posted, buffer, use.number, needs))
        peers = [q for q in self._others[rank] if rank in use.owners or q in use.owners]
        return self._add(
            rank, posted + 1, buffer, use.number, [(q, posted, buffer, use.number) for q in [rank, *peers]]
        )

    def _first_raise(
        self, event: _Event, rank: int, kind: int, buffer: int, number: int
    ) -> Iterator[tuple[int, _Event]]:
        """The event from which on a rank's events of this kind have come to at least this number."""
        if number == 0:
            return
        for raised, source in self._raised.get((rank, kind, buffer), []):
            if raised >= number:
                yield self._queue(rank, kind), source
                return
        self._fail(f"{_name(event)} waits for {_NAMES[kind]} of wave {number} on rank {rank}, which never comes")

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
                    rank, other = write[0] % self._num_ranks, queue % self._num_ranks
                    self._fail(f"{_name(write[1])} on rank {rank} may overtake {_name(read)} on rank {other}")
        for reader, (queue, wanted) in self._read_of:
            if wanted in places[queue] and clocks[reader][queue] < places[queue][wanted]:
                rank, writer = reader[0] % self._num_ranks, queue % self._num_ranks
                self._fail(f"{_name(reader[1])} on rank {rank} may come before {_name(wanted)} on rank {writer}")

    def _fail(self, text: str) -> None:
        raise PlanError(f"buffers are free across ranks: slot {self._slot}: {text}")


def _name(event: _Event) -> str:
    kind, buffer, what = event
    if kind == _ATTENDED:
        return f"attention of cohort {what[0]} in layer {what[1]}"
    return f"{_NAMES[kind]} of wave {what[0]} in buffer {buffer}"
