"""The run of a plan by ranks that share memory: rows and partial sums stay where they are; flags say who may read them.

compute    attend  write rows, flag  ...wait for the owners' flags... experts, flag  attend of the next layer ...
combine                                                       ...wait for all ranks' flags... add up, flag
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipemoe.comm.shared.flags import FlagEvent
from pipemoe.runtime.host_lanes import HostLanes
from pipemoe.runtime.lanes import Event, SlotLanes
from pipemoe.runtime.run import Run, _CohortState
from pipemoe.wire import ScatteredRows, WireFormat

if TYPE_CHECKING:
    from pipemoe.plan.schedule import Op, Plan
    from pipemoe.runtime.workspace import Workspace


class SharedWaveBuffers:
    """The views of one wave in one of its slot's buffers; see WaveBuffers."""

    def __init__(
        self, plan: Plan, rank: int, cohort: int, wave: int, buffer: int, workspace: Workspace, wire: WireFormat
    ) -> None:
        shared = workspace.shared
        assert shared is not None
        self.slot, self.buffer = plan.cohorts[cohort].slot, buffer
        self.wave = plan.cohorts[cohort].waves[wave]
        self.exchange = plan.exchange(self.wave)
        self.scratch = workspace.slots[self.slot].scratch
        memories, starts, pieces = shared.rows[self.slot, buffer], [0] * plan.facts.num_ranks, []
        for s in self.wave.segments:
            start = starts[s.rank]
            pieces.append((s, wire.rows(memories[s.rank][start : start + s.num_rows])))
            starts[s.rank] += s.num_rows
        self.own = [(s, rows) for s, rows in pieces if s.rank == rank]
        self.has_padding = False  # no rank reads padding
        self.rows = ScatteredRows([(s.row, rows) for s, rows in pieces], self.wave.num_rows)
        # If nothing is exchanged, nobody says when others' rows may be read: this rank's memory stands in for theirs.
        stand_ins = [(s.row, wire.rows(memories[rank][: s.num_rows])) for s, _ in pieces]
        self.stand_in_rows = ScatteredRows(stand_ins, self.wave.num_rows)
        # Every rank's partial sums [n, H], in rank order.
        self.partials = [memory[: self.wave.num_rows] for memory in shared.sums[self.slot, buffer]]
        self.partial = self.partials[rank]


class SharedRun(Run):
    """Run over SharedWaves."""

    _transport: Any  # SharedWaves

    def __init__(self, plan: Plan, rank: int, lanes: HostLanes, *arguments: Any, **options: Any) -> None:
        lanes.begin({cohort.slot for cohort in plan.cohorts})
        super().__init__(plan, rank, lanes, *arguments, **options)

    def _new_views(self, cohort: int, wave: int, buffer: int) -> Any:
        return SharedWaveBuffers(self._plan, self._rank, cohort, wave, buffer, self._workspace, self._wire)

    def _writes_in_place(self, cohort: int, state: _CohortState) -> bool:
        """Never: attention would have to wait for the readers of the rows before."""
        return False

    def _dispatch(self, op: Op, state: _CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)
        waves, only = self._transport, self._only
        place = views.slot, views.buffer
        used.use = use = waves.use(*place, views.wave) if only.communication else None
        sent: Any = FlagEvent.passed()
        if use is not None:
            sent = waves.sent(*place, use)
            waves.note_dispatch(*place, views.wave, views.exchange, self._wire.row_bytes)
        event = sent

        def work() -> None:
            if only.computation:
                self._pack(op, state, views)
            if use is not None:
                waves.tell_sent(*place, use)
                sent.begin()

        used.written = None
        if views.own:
            free = used.read if use is None else waves.rows_free(*place, use)
            used.written = lanes.compute.submit(work, [free])
            event = used.written if use is None else sent
        state.groups += 1
        used.dispatched = event
        if op.wave == 0 and state.has_tokens and self._source.has_side_work:
            lanes.compute.submit(self._model_work(state, lambda: self._source.side_work(op.cohort)))
        return event

    def _compute(self, op: Op, state: _CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)
        waves, only, use = self._transport, self._only, used.use

        def work() -> None:
            if only.computation:
                rows = views.rows if use is not None else views.stand_in_rows
                self._experts(op.layer, rows, views.partial, views.scratch)
            if use is not None:
                waves.tell_summed(views.slot, views.buffer, use)

        free = used.sent if use is None else waves.sums_free(views.slot, views.buffer, use)
        used.read = lanes.compute.submit(work, [used.dispatched, free, used.written])  # the last: for its errors
        return used.read

    def _combine(self, op: Op, state: _CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)
        waves, use = self._transport, used.use
        event: Any = FlagEvent.passed()
        if use is not None:
            combine = self._plan.config.combine
            waves.note_combine(views.slot, views.buffer, views.wave, views.exchange, combine, views.partial)

        def work() -> None:
            results = [self._results(op.cohort, state, segment) for segment, _ in views.own]
            waves.add_up(views.wave, views.partials, results)
            waves.tell_combined(views.slot, views.buffer, use)

        if use is not None and views.own:
            event = lanes.combine.submit(work, [used.read, waves.summed(views.slot, views.buffer, use)])
        used.sent = event
        if views.own:
            state.results.append(event)
            self._of_source(state, lambda: self._source.combined(op.cohort, op.layer, event), always=True)
        return event
