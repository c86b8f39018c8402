"""The run of one plan on one rank: issues its operations over lanes and events, whatever the device.

    compute lane    attend  pack w0  pack w1          experts w0           pack w2  experts w1 ...
    dispatch lane                 bcast w0  bcast w1                             bcast w2
    combine lane                                                  reduce w0           reduce w1

Operations are issued in the plan's order, with one exception: a cohort is passed over while it has `MAX_GROUPS` groups
of dispatches under way, or while its next operation waits for the caller. That keeps the host queues short without
tying a short cohort to a long one. Every communicator sees the plan's order, but ranks may interleave communicators
differently. That is safe only if no stream ever holds up another: there is room for all thread blocks (`Room`), a
hardware queue per stream, and no allocation inside a step (`reserve`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipemoe.comm.transport import Test, Transport, WaveSums
from pipemoe.plan.schedule import MAX_GROUPS, Op, OpKind, Plan, Segment
from pipemoe.runtime.lanes import Event, Lanes, SlotLanes
from pipemoe.runtime.run_state import BufferState, CohortState
from pipemoe.runtime.source import Source
from pipemoe.runtime.wave_buffers import WaveBuffers
from pipemoe.wire import WireFormat, WireRows

if TYPE_CHECKING:
    from pipemoe.runtime.host_lanes import HostLanes, LinkedLanes
    from pipemoe.runtime.workspace import Workspace

LANE_OF = {
    OpKind.ATTEND: "compute",
    OpKind.DISPATCH: "dispatch",
    OpKind.EXPERTS: "compute",
    OpKind.COMBINE: "combine",
    OpKind.FINISH: "compute",
}


@dataclass(frozen=True, slots=True)
class Only:
    """Which side of a run does its work, to measure it alone. The other side's operations are empty."""

    computation: bool = True
    communication: bool = True


class Run:
    """One plan under way on this rank; the conductor calls `advance` until it returns True."""

    spins = False  # does `advance` wait by itself, for a bounded time?

    def __init__(
        self,
        plan: Plan,
        rank: int,
        lanes: Lanes | HostLanes | LinkedLanes,
        transport: Transport,
        workspace: Workspace,
        wire: WireFormat,
        experts: Any,
        source: Source,
        *,
        only: Only = Only(),
        timed: bool = False,
        on_progress: Callable[[object], None] = lambda op: None,
        on_progress_made: Callable[[], None] = lambda: None,
        on_done: Callable[[Op], None] = lambda op: None,
    ) -> None:
        """on_progress: called before an operation is issued, with what names it. on_progress_made: called when one has
        completed. on_done: the caller's, called then too; an exception in it counts as one in model code.
        """
        self._plan, self._rank, self._lanes, self._transport = plan, rank, lanes, transport
        self._workspace, self._wire, self._experts, self._source = workspace, wire, experts, source
        self._only, self._on_progress, self._on_progress_made, self._on_done = (
            only,
            on_progress,
            on_progress_made,
            on_done,
        )
        self._failure: BaseException | None = None  # of the caller's functions
        self._ops = plan.ops
        self._cohorts = [CohortState(bool(c.tokens_of(rank))) for c in plan.cohorts]
        self._buffer_states = [[BufferState() for _ in range(plan.config.num_buffers)] for _ in workspace.slots]
        self._position = {op: position for position, op in enumerate(self._ops)}
        for op, position in self._position.items():
            self._cohorts[op.cohort].positions.append(position)
        self._views: dict[tuple[int, int, int], Any] = {}  # by cohort, wave and buffer
        self._attended: dict[tuple[int, int], Event] = {}
        self._finished: dict[int, Event] = {}  # per cohort
        self._under_way: dict[tuple[int, str], deque[tuple[Op, Event]]] = {}
        self.failed_op: Op | None = None  # of which `advance` has raised
        self.completed: list[tuple[Op, Event]] = []
        self.issue_seconds: list[tuple[Op, float]] = []  # what the conductor's thread took, if timed
        self.issued_seconds = 0.0  # the sum over operations of layers, timed or not
        self.own_finished = 0  # cohorts with tokens of this rank that have finished
        self.num_own = sum(c.has_tokens for c in self._cohorts)
        self._timed = timed
        self._awaited = {other for cohorts in (*plan.causal_predecessors, *plan.pacemakers) for other in cohorts}
        lanes.begin({cohort.slot for cohort in plan.cohorts})
        lanes.clock.start(timed)
        self.of_caller(lambda: source.begin(plan, rank))
        for state in self._cohorts:
            state.failure = self._failure

    @property
    def failure(self) -> BaseException | None:
        """The first exception of this rank's model code, if any; the run went on without that cohort's rows."""
        return next((c.failure for c in self._cohorts if c.failure is not None), self._failure)

    def of_caller(self, work: Callable[[], None]) -> None:
        """Call a function of the caller's. If it raises, that is the step's failure, and no such function is called
        again.
        """
        if self._failure is None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                self._failure = error

    def advance(self) -> bool:
        """Issue all operations that may be issued, and note those that have completed. True when the whole plan has.
        Sets `failed_op` if it raises.
        """
        op = None
        try:
            self._poll()
            while (op := self._next()) is not None:
                self._on_progress(op)
                self._cohorts[op.cohort].positions.popleft()
                begin = time.perf_counter()
                event = self._issue(op)
                seconds = time.perf_counter() - begin
                if op.kind is not OpKind.FINISH:
                    self.issued_seconds += seconds
                if self._timed:
                    self.issue_seconds.append((op, seconds))
                self._under_way.setdefault((self._plan.cohorts[op.cohort].slot, LANE_OF[op.kind]), deque()).append(
                    (op, event)
                )
                self._lanes.poll(between_issues=True)
        except BaseException as error:
            self.failed_op = self._op_of(error) or self.failed_op or op or self.oldest()
            raise
        return not any(self._under_way.values()) and not any(c.positions for c in self._cohorts)

    def oldest(self) -> Op | None:
        """The first operation in the plan's order that is under way: issued, and not complete."""
        heads = [queue[0][0] for queue in self._under_way.values() if queue]
        return min(heads, key=self._position.__getitem__, default=None)

    def not_begun(self) -> str | None:
        """The operation that waits for the caller, in words, if any is left. For when none is under way."""
        positions = [state.positions[0] for state in self._cohorts if state.positions]
        return f"{self._ops[min(positions)]}, for which the caller has given no rows yet" if positions else None

    def _op_of(self, error: BaseException) -> Op | None:
        """The operation under way that has raised `error`, if an event of the host tells."""
        return next(
            (op for queue in self._under_way.values() for op, event in queue if getattr(event, "error", None) is error),
            None,
        )

    def _poll(self) -> None:
        op = None
        try:
            self._lanes.poll()
            for queue in self._under_way.values():
                while queue:
                    op, event = queue[0]
                    if not event.done():
                        break
                    queue.popleft()
                    state = self._cohorts[op.cohort]
                    if self._timed:
                        self.completed.append((op, event))
                    if op.kind is OpKind.DISPATCH:
                        state.groups -= 1
                    elif op.kind is OpKind.FINISH and state.has_tokens:
                        self._of_source(state, partial(self._tell_finished, op.cohort, event))
                        self.own_finished += 1
                    self._on_progress_made()
                    self.of_caller(partial(self._on_done, op))
        except BaseException:
            self.failed_op = op
            raise

    def _tell_finished(self, cohort: int, event: Event) -> None:
        self._source.finished(cohort, event.end())

    def _next(self) -> Op | None:
        """The first operation in the plan's order that may be issued."""
        best = None
        for c, state in enumerate(self._cohorts):
            if (
                state.positions
                and (best is None or state.positions[0] < best)
                and self._may_issue(c, self._ops[state.positions[0]])
            ):
                best = state.positions[0]
        return None if best is None else self._ops[best]

    def _may_issue(self, c: int, op: Op) -> bool:
        state, plan = self._cohorts[c], self._plan
        if op.kind is OpKind.DISPATCH:
            return state.groups < MAX_GROUPS
        if op.kind is OpKind.FINISH:
            return all(e in self._finished for e in plan.causal_predecessors[c])
        if op.kind is not OpKind.ATTEND:
            return True
        if op.layer == 0:
            slot = plan.cohorts[c].slot
            if any(plan.cohorts[e].slot == slot and self._cohorts[e].positions for e in range(c)):
                return False
        if any(attend not in self._attended for attend in self._attends_before(op)):
            return False
        return not state.has_tokens or self._of_source(state, lambda: self._source.ready(c, op.layer), True)

    def _issue(self, op: Op) -> Event:
        lanes = self._lanes.slots[self._plan.cohorts[op.cohort].slot]
        # looked up each time, not bound methods kept by the run: a finished run must not wait for the cycle collector
        return getattr(self, _ISSUE[op.kind])(op, self._cohorts[op.cohort], lanes)

    def _attends_before(self, op: Op) -> list[tuple[int, int]]:
        """Cohort and layer of the attentions for which this one waits: those of earlier chunks, for their keys and
        values, and those that set its pace.
        """
        before = [(e, op.layer) for e in self._plan.causal_predecessors[op.cohort]]
        return before + [(e, op.layer - 1) for e in self._plan.pacemakers[op.cohort] if op.layer]

    def _attend(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
        waits: list[Event | None] = [*state.results, *(self._attended[a] for a in self._attends_before(op))]
        state.results = []
        rows: tuple[WireRows, ...] = ()
        if self._writes_in_place(op.cohort, state):
            views, used = self._place(Op(OpKind.DISPATCH, op.cohort, op.layer, 0))
            waits.append(used.read)
            rows = (views.own[0][1],)
        attend = self._model_work(state, lambda: self._source.attend(op.cohort, op.layer, *rows))
        state.attended = event = lanes.compute.submit(attend, waits)
        if op.cohort in self._awaited:
            self._attended[op.cohort, op.layer] = event
        return event

    def _writes_in_place(self, cohort: int, state: CohortState) -> bool:
        """Does the source write its rows of the cohort where the broadcast sends them from?"""
        if state.in_place is None:
            waves = self._plan.cohorts[cohort].waves
            state.in_place = (
                self._source.writes_rows
                and len(waves) == 1
                and sum(segment.rank == self._rank for segment in waves[0].segments) == 1
                and self._plan.exchange(waves[0]) != "padded"
            )
        return state.in_place

    def _dispatch(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)
        free: list[Event | None] = [used.read]
        if self._only.computation and views.is_sent_from_here:
            written = self._writes_in_place(op.cohort, state) and state.failure is None
            free = [state.attended if written else lanes.compute.submit(lambda: self._pack(op, state, views), free)]
        state.groups += 1
        used.dispatched = lanes.dispatch.submit(lambda: self._send(views), free)
        if op.wave == 0 and state.has_tokens and self._source.has_side_work:
            lanes.compute.submit(self._model_work(state, lambda: self._source.side_work(op.cohort)))
        return used.dispatched

    def _send(self, views: WaveBuffers) -> Test | None:
        if self._only.communication:
            return self._transport.dispatch(views.slot, views.buffer, views.wave, views.exchange, views.received)
        return None

    def _pack(self, op: Op, state: CohortState, views: WaveBuffers) -> None:
        """Write this rank's rows of a wave in wire format into the buffer that the broadcast sends from."""
        if views.has_padding:
            views.own_block_ids.fill_(-1)
        for segment, part in views.own:
            self._of_source(state, partial(self._write, op.cohort, segment, part))
            if state.failure is not None:  # the others still expect rows: send rows that no expert takes
                part.ids.fill_(-1)

    def _write(self, cohort: int, segment: Segment, part: WireRows) -> None:
        part.write(*self._source.rows(cohort, segment.start, segment.stop))

    def _compute(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)

        def work() -> None:
            if self._only.computation:
                self._experts(op.layer, views.rows, views.partial, views.scratch)

        used.read = lanes.compute.submit(work, [used.dispatched, used.sent])
        return used.read

    def _combine(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)

        def work() -> Any:
            results = [self._results(op.cohort, state, segment) for segment, _ in views.own]
            sums = WaveSums(views.partial, results, views.staging)
            return self._transport.combine(
                views.slot, views.buffer, views.wave, views.exchange, self._plan.config.combine, sums
            )

        used.sent = sent = lanes.combine.submit(self._transport_work(work), [used.read])
        if views.own:
            state.results.append(sent)
            self._of_source(state, lambda: self._source.combined(op.cohort, op.layer, sent), always=True)
        return sent

    def _results(self, cohort: int, state: CohortState, segment: Segment) -> Any:
        """The tensor for a segment's sums. If this rank's model code failed, one that nobody reads."""
        results = self._of_source(state, lambda: self._source.results(cohort, segment.start, segment.stop))
        return self._workspace.new_results(segment.num_rows) if results is None else results

    def _finish(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
        # Dense layers after the last MoE layer attend too: they read the keys and values of earlier chunks.
        waits = state.results + [self._finished[e] for e in self._plan.causal_predecessors[op.cohort]]
        event = lanes.compute.submit(self._model_work(state, lambda: self._source.finish(op.cohort)), waits, timed=True)
        self._finished[op.cohort] = event
        return event

    def _place(self, op: Op) -> tuple[Any, BufferState]:
        """The workspace's views for a wave's operation, and the buffer's last users."""
        buffer = self._plan.buffer(*op[1:])
        place = op.cohort, op.wave, buffer
        if place not in self._views:
            self._views[place] = self._new_views(*place)
        views = self._views[place]
        return views, self._buffer_states[views.slot][buffer]

    def _new_views(self, cohort: int, wave: int, buffer: int) -> Any:
        return WaveBuffers(self._plan, self._rank, cohort, wave, buffer, self._workspace, self._wire)

    def _model_work(self, state: CohortState, work: Callable[[], None]) -> Callable[[], None]:
        """Model code as work of a lane."""

        def guarded() -> None:
            if state.has_tokens and self._only.computation:
                self._of_source(state, work)

        return guarded

    def _of_source(
        self, state: CohortState, ask: Callable[[], Any], otherwise: Any = None, *, always: bool = False
    ) -> Any:
        """The source's answer, or `otherwise`.

        An exception of any kind fails the cohort's rows on this rank, not the step. Then the source is asked nothing
        more about the cohort, unless `always`.
        """
        if state.failure is None or always:
            try:
                return ask()
            except BaseException as error:  # noqa: BLE001
                state.failure = state.failure or error
        return otherwise

    def _transport_work(self, work: Callable[[], Any]) -> Callable[[], Any]:
        return work if self._only.communication else _nothing


_ISSUE = {
    OpKind.ATTEND: "_attend",
    OpKind.DISPATCH: "_dispatch",
    OpKind.EXPERTS: "_compute",
    OpKind.COMBINE: "_combine",
    OpKind.FINISH: "_finish",
}


def _nothing() -> None:
    pass
