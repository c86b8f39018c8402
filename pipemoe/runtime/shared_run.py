"""The run of a plan by ranks that share memory: rows and partial sums stay where they are; flags say who may read them.

compute    attend  write rows, flag  ...wait for the owners' flags... experts, flag  attend of the next layer ...
combine                                                       ...wait for all ranks' flags... add up, flag

To ranks of other hosts an owner also sends its rows, and every rank sends its partial sums of their rows, by messages
(`HostLinks`) in two lanes beside these:

links      ...rows written... to and from other hosts    ...experts... sums to and from other hosts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipemoe.comm.shared.flags import FlagEvent, JoinedEvent
from pipemoe.comm.shared.waves import add_in_order
from pipemoe.runtime.lanes import Event, SlotLanes
from pipemoe.runtime.run import Run
from pipemoe.runtime.run_state import CohortState
from pipemoe.wire import ScatteredRows, WireFormat

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.mpi import HostLinks, Message
    from pipemoe.plan.schedule import Op, Plan, Segment
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
        slot = workspace.slots[self.slot]
        self.scratch = slot.scratch
        memories, starts, pieces = shared.rows[self.slot, buffer], [0] * plan.facts.num_ranks, []
        for s in self.wave.segments:
            # Rows of other hosts have their places in a buffer of this rank's own.
            memory, start = (memories[s.rank], starts[s.rank]) if s.rank in memories else (slot.receive[buffer], s.row)
            pieces.append((s, memory[start : start + s.num_rows]))
            starts[s.rank] += s.num_rows
        self.own = [(s, wire.rows(memory)) for s, memory in pieces if s.rank == rank]
        self.has_padding = False  # no rank reads padding
        self.rows = ScatteredRows([(s.row, wire.rows(memory)) for s, memory in pieces], self.wave.num_rows)
        # If nothing is exchanged, nobody says when others' rows may be read: this rank's memory stands in for theirs.
        stand_ins = [(s.row, wire.rows(memories[rank][: s.num_rows])) for s, _ in pieces]
        self.stand_in_rows = ScatteredRows(stand_ins, self.wave.num_rows)
        sums = {peer: memory[: self.wave.num_rows] for peer, memory in shared.sums[self.slot, buffer].items()}
        self.partial = sums[rank]  # [n, H]
        others = [peer for peer in range(plan.facts.num_ranks) if peer not in memories]
        own_rows = {s: memory for s, memory in pieces if s.rank == rank}
        staged: dict[tuple[int, Segment], torch.Tensor] = {}  # others' sums of this rank's rows
        first = 0
        for s in own_rows:
            staged |= {(q, s): slot.staging[buffer][i, first : first + s.num_rows] for i, q in enumerate(others)}
            first += s.num_rows
        # Messages to and from ranks of other hosts.
        self.rows_to_send: list[Message] = [(peer, memory) for memory in own_rows.values() for peer in others]
        self.rows_to_come: list[Message] = [(s.rank, memory) for s, memory in pieces if s.rank in others]
        self.sums_to_send: list[Message] = [(s.rank, _of(self.partial, s)) for s, _ in pieces if s.rank in others]
        self.sums_to_come: list[Message] = [(peer, memory) for (peer, _), memory in staged.items()]
        # For each of this rank's segments, all ranks' partial sums, in rank order.
        ranks = range(plan.facts.num_ranks)
        self.parts = [[_of(sums[q], s) if q in sums else staged[q, s] for q in ranks] for s in own_rows]


def _of(memory: torch.Tensor, segment: Segment) -> torch.Tensor:
    return memory[segment.row : segment.row + segment.num_rows]


class SharedRun(Run):
    """Run over SharedWaves, and `links` to ranks of other hosts, if there are any."""

    _transport: Any  # SharedWaves
    _lanes: Any  # HostLanes, or LinkedLanes

    def __init__(self, *arguments: Any, links: HostLinks | None = None, **options: Any) -> None:
        self._links = links
        super().__init__(*arguments, **options)

    def _new_views(self, cohort: int, wave: int, buffer: int) -> Any:
        return SharedWaveBuffers(self._plan, self._rank, cohort, wave, buffer, self._workspace, self._wire)

    def _writes_in_place(self, cohort: int, state: CohortState) -> bool:
        """Never: attention would have to wait for the readers of the rows before."""
        return False

    def _move(
        self, views: SharedWaveBuffers, kind: str, sends: list[Message], receives: list[Message], waits: list[Any]
    ) -> Event | None:
        """Let messages to and from other hosts go, if there are any."""
        links, slot = self._links, views.slot
        if links is None or not self._only.communication or not (sends or receives):
            return None
        return self._lanes.links[slot][kind == "combine"].submit(lambda: links.move(slot, kind, sends, receives), waits)

    def _dispatch(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
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
        used.dispatched = event
        waits = [used.written, used.read]
        used.rows_moved = self._move(views, "dispatch", views.rows_to_send, views.rows_to_come, waits)
        state.groups += 1
        if op.wave == 0 and state.has_tokens and self._source.has_side_work:
            lanes.compute.submit(self._model_work(state, lambda: self._source.side_work(op.cohort)))
        return event if used.rows_moved is None else JoinedEvent(event, used.rows_moved)

    def _compute(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)
        waves, only, use = self._transport, self._only, used.use

        def work() -> None:
            if only.computation:
                rows = views.rows if use is not None else views.stand_in_rows
                self._experts(op.layer, rows, views.partial, views.scratch)
            if use is not None:
                waves.tell_summed(views.slot, views.buffer, use)

        free = used.sent if use is None else waves.sums_free(views.slot, views.buffer, use)
        # used.written: for its errors
        waits = [used.dispatched, free, used.sums_moved, used.rows_moved, used.written]
        used.read = lanes.compute.submit(work, waits)
        return used.read

    def _combine(self, op: Op, state: CohortState, lanes: SlotLanes) -> Event:
        views, used = self._place(op)
        waves, use = self._transport, used.use
        event: Any = FlagEvent.passed()
        if use is not None:
            combine = self._plan.config.combine
            waves.note_combine(views.slot, views.buffer, views.wave, views.exchange, combine, views.partial)
        # used.sent: of the buffer's last wave, whose sums have then been read
        waits = [used.read, used.sent]
        used.sums_moved = moved = self._move(views, "combine", views.sums_to_send, views.sums_to_come, waits)
        if moved is not None:
            event = moved

        def work() -> None:
            results = [self._results(op.cohort, state, segment) for segment, _ in views.own]
            for parts, result in zip(views.parts, results, strict=True):
                add_in_order(parts, result)
            waves.tell_combined(views.slot, views.buffer, use)

        if use is not None and views.own:
            summed = waves.summed(views.slot, views.buffer, use)
            event = lanes.combine.submit(work, [used.read, moved, summed])
        used.sent = event
        if views.own:
            state.results.append(event)
            self._of_source(state, lambda: self._source.combined(op.cohort, op.layer, event), always=True)
        return event
