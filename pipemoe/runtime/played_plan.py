"""A plan as records for the compiled loop of the host (pipemoe.comm.shared.player): what SharedRun does for each
operation, written down once for all steps by the plan.

A step changes only the numbers of its waves, and where the model's rows and results lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipemoe.comm.shared import player as of
from pipemoe.comm.shared.prepared import PreparedRows, PreparedSums
from pipemoe.comm.shared.waves import COMBINED, SENT, SUMMED
from pipemoe.plan.schedule import Op, OpKind, Plan
from pipemoe.runtime.shared_run import SharedWaveBuffers

if TYPE_CHECKING:
    from pipemoe.addresses import Call
    from pipemoe.comm.shared.waves import SharedWaves
    from pipemoe.plan.schedule import Wave
    from pipemoe.runtime.workspace import Workspace
    from pipemoe.wire import WireFormat

_Wait = tuple[int, int, int]  # see player
_BY_PYTHON = (of.FOR_PYTHON, 0)


def queue_of(op: Op) -> int:
    return of.SUMS if op.kind is OpKind.COMBINE else of.COMPUTATIONS


class WaveCalls(NamedTuple):
    """A wave in one of its slot's buffers, and what is called for it. pack, add: if this rank has rows in it."""

    views: SharedWaveBuffers
    experts: list[Call]  # of each layer
    pack: PreparedRows | None
    add: PreparedSums | None


class _Use(NamedTuple):
    """Of a buffer, by a wave. number: of the wave in its slot and step, from 1 on; 0: one of the step before."""

    number: int
    owners: tuple[int, ...] | None  # None: whoever it was


class PlayedPlan:
    """One plan on one rank."""

    def __init__(
        self, plan: Plan, rank: int, waves: SharedWaves, workspace: Workspace, wire: WireFormat, experts: object
    ) -> None:
        self.plan, self.rank, self.waves = plan, rank, waves
        self.position = {op: position for position, op in enumerate(plan.ops)}
        self.attends = {(op.cohort, op.layer): op for op in plan.ops if op.kind is OpKind.ATTEND}
        self.finishes = {op.cohort: op for op in plan.ops if op.kind is OpKind.FINISH}
        self.calls: dict[tuple[int, int, int], WaveCalls | None] = {}  # by cohort, wave and buffer
        self.place: dict[Op, tuple[int, int, int]] = {}  # slot, queue, and number in it
        cohorts_of: dict[int, list[int]] = {}
        for c, cohort in enumerate(plan.cohorts):
            cohorts_of.setdefault(cohort.slot, []).append(c)
        of_cohort: list[list[Op]] = [[] for _ in plan.cohorts]
        for op in plan.ops:
            of_cohort[op.cohort].append(op)
        for c, cohort in enumerate(plan.cohorts):
            for w in range(len(cohort.waves)):
                for buffer in {plan.buffer(c, layer, w) for layer in range(plan.shape.num_layers)}:
                    self.calls[c, w, buffer] = self._calls(c, w, buffer, workspace, wire, experts)
        self.is_whole = all(calls is not None for calls in self.calls.values())  # else it cannot be played
        self.has_tokens = [bool(cohort.tokens_of(rank)) for cohort in plan.cohorts]
        self.slots: dict[int, PlayedSlot] = {}
        if not self.is_whole:
            return
        ops_of = {slot: [op for c in cohorts for op in of_cohort[c]] for slot, cohorts in cohorts_of.items()}
        for slot, ops in ops_of.items():
            numbers = [0, 0]
            for op in ops:
                queue = queue_of(op)
                self.place[op] = slot, queue, numbers[queue]
                numbers[queue] += 1
            self.slots[slot] = PlayedSlot(self, slot)
        for slot, ops in ops_of.items():
            self.slots[slot].take(ops)

    def _calls(
        self, c: int, w: int, buffer: int, workspace: Workspace, wire: WireFormat, experts: object
    ) -> WaveCalls | None:
        """None if something cannot be called by compiled code."""
        views = SharedWaveBuffers(self.plan, self.rank, c, w, buffer, workspace, wire)
        prepare = getattr(experts, "prepared", None)
        of_experts = None if prepare is None else prepare(views.rows, views.partial, views.scratch)
        if of_experts is None:
            return None
        pack = add = None
        if views.own:
            pack = PreparedRows([rows for _, rows in views.own])
            add = PreparedSums(views.parts, wire.hidden)
        return WaveCalls(views, of_experts, pack, add)

    def before(self, op: Op) -> list[Op]:
        """Operations for which an attention waits, or the end of a cohort; see Run."""
        plan, c = self.plan, op.cohort
        if op.kind is OpKind.FINISH:
            return [self.finishes[e] for e in plan.causal_predecessors[c]]
        attends = [(e, op.layer) for e in plan.causal_predecessors[c]]
        attends += [(e, op.layer - 1) for e in plan.pacemakers[c] if op.layer]
        return [self.attends[attend] for attend in attends]

    def wave_calls(self, op: Op) -> WaveCalls | None:
        """None for operations of no wave."""
        if op.kind in (OpKind.ATTEND, OpKind.FINISH):
            return None
        return self.calls[op.cohort, op.wave, self.plan.buffer(*op[1:])]


class PlayedSlot:
    """The records of one slot's cohorts."""

    def __init__(self, played: PlayedPlan, slot: int) -> None:
        self.number, self._played, self._waves = slot, played, played.waves
        self.done = np.zeros(3, np.int32)  # see player.WORDS
        self.ops: tuple[list[Op], list[Op]] = ([], [])  # of each queue
        self._of_step: list[tuple[int, Wave]] = []  # the slot's waves in their order, each with its buffer
        self._uses: dict[tuple[int, int, int], tuple[_Use, _Use]] = {}  # by cohort, layer and wave: its and the last
        self._records: tuple[list[list[int]], list[list[int]]] = ([], [])
        self._waits: list[_Wait] = []
        self._first: dict[tuple[int, OpKind], range] = {}  # by buffer: waits for the wave that had it before the step
        self._bells: list[int] = []
        self._rings: dict[tuple[int, ...], tuple[int, int, int]] = {}

    def take(self, ops: Sequence[Op]) -> None:
        """Write all of the slot's operations down."""
        last: dict[int, _Use] = {}  # by buffer
        last_sum: dict[int, Op] = {}  # by cohort: of this rank's rows
        for op in ops:
            calls = self._played.wave_calls(op)
            if calls is None:
                self._add(
                    op, self._before(op, last_sum.get(op.cohort)), _BY_PYTHON * self._played.has_tokens[op.cohort]
                )
                continue
            if op.kind is OpKind.DISPATCH:
                buffer, wave = calls.views.buffer, calls.views.wave
                self._of_step.append((buffer, wave))
                use = _Use(len(self._of_step), self._waves.places(wave))
                self._uses[op.cohort, op.layer, op.wave] = use, last.get(buffer, _Use(0, None))
                last[buffer] = use
            self._add_of_wave(op, calls)
            if op.kind is OpKind.COMBINE and calls.add is not None:
                last_sum[op.cohort] = op
        self._end()

    def _before(self, op: Op, last_sum: Op | None) -> list[_Wait]:
        """What an attention or the end of a cohort waits for."""
        before = self._played.before(op) + ([] if last_sum is None else [last_sum])
        return [self._after(other) for other in before]

    def _after(self, op: Op) -> _Wait:
        """The wait for an operation of this rank."""
        slot, queue, number = self._played.place[op]
        kind = of.OWN if slot == self.number else of.OTHER_SLOT
        return self._played.slots[slot].done.ctypes.data + 4 * queue, number + 1, kind

    def _add_of_wave(self, op: Op, calls: WaveCalls) -> None:
        waves, slot, buffer = self._waves, self.number, calls.views.buffer
        use, before = self._uses[op.cohort, op.layer, op.wave]

        def flags(flag: int, of_use: _Use, kind: int, ranks: tuple[int, ...] | None) -> list[_Wait]:
            return [(address, of_use.number, kind) for address in waves.flags(slot, buffer, flag, ranks)]

        def tells(flag: int, expecting: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
            return waves.own_flag(slot, buffer, flag), use.number, expecting

        if op.kind is OpKind.DISPATCH and calls.pack is not None:
            self._add(op, flags(SUMMED, before, of.OF_REUSE, None), _BY_PYTHON, tells(SENT, waves.everyone), buffer)
        elif op.kind is OpKind.EXPERTS:
            rows = flags(SENT, use, of.A_FLAG, use.owners)
            free = flags(COMBINED, before, of.OF_REUSE, before.owners)
            self._add(op, rows + free, calls.experts[op.layer][:2], tells(SUMMED, use.owners or ()), buffer)
        elif op.kind is OpKind.COMBINE and calls.add is not None:
            sums = [self._after(Op(OpKind.EXPERTS, *op[1:])), *flags(SUMMED, use, of.A_FLAG, None)]
            self._add(op, sums, _BY_PYTHON, tells(COMBINED, ()))
        else:
            self._add(op, [])

    def _add(
        self,
        op: Op,
        waits: Sequence[_Wait],
        call: Sequence[int] = (),
        tells: tuple[int, int, tuple[int, ...]] | None = None,
        buffer: int = 0,
    ) -> None:
        """tells: of a flag its address and number, and the ranks that wait for it."""
        queue, first = queue_of(op), len(self._waits)
        numbers = [first + i for i, wait in enumerate(waits) if wait[of.KIND] == of.OF_REUSE and not wait[of.COME_TO]]
        if numbers:
            self._first[buffer, op.kind] = range(numbers[0], numbers[-1] + 1)
        self._waits += waits
        flag, number, rings = 0, 0, (0, 0, 0)
        if tells is not None:
            flag, number, rings = *tells[:2], self._rings_of(tells[2])
        self.ops[queue].append(op)
        self._records[queue].append(
            [*(call or (0, 0)), 0, 0, first, len(self._waits), flag, number, *rings, self._played.position[op]]
        )

    def _rings_of(self, expecting: tuple[int, ...]) -> tuple[int, int, int]:
        if expecting not in self._rings:
            begin, (expecting_bells, others) = len(self._bells), self._waves.bells.groups(expecting)
            self._bells += [*expecting_bells.tolist(), *others.tolist()]
            self._rings[expecting] = begin, begin + len(expecting_bells), len(self._bells)
        return self._rings[expecting]

    def _end(self) -> None:
        self.waits = np.array(self._waits, np.int64).reshape(-1, of.KIND + 1)
        self._counted = np.isin(self.waits[:, of.KIND], (of.A_FLAG, of.OF_REUSE))
        self.records = [np.array(of_queue, np.int64).reshape(-1, of.OP + 1) for of_queue in self._records]
        self.bells = np.array(self._bells, np.int64)
        self.waits_for_others = bool((self.waits[:, of.KIND] == of.OTHER_SLOT).any())

    def for_step(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Records and waits with a step's numbers. Every rank calls, in the same order."""
        records, waits = [of_queue.copy() for of_queue in self.records], self.waits.copy()
        uses = [self._waves.use(self.number, buffer, wave) for buffer, wave in self._of_step]
        base = uses[0].number - 1 if uses else 0
        waits[self._counted, of.COME_TO] += base
        for of_queue in records:
            of_queue[:, of.NUMBER] += base
        for (buffer, kind), rows in self._first.items():
            use = next(use for use, (at, _) in zip(uses, self._of_step, strict=True) if at == buffer)
            for row in rows:
                waits[row, of.COME_TO] = use.before
            if kind is OpKind.EXPERTS:
                combined = self._waves.flags(self.number, buffer, COMBINED, use.owners_before)
                for row in rows:
                    if waits[row, of.ADDRESS] not in combined:
                        waits[row, of.ADDRESS] = 0
        return records, waits
