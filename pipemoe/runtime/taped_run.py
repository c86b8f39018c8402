"""A run on a rank without peers, whose operations are played from a tape where that is possible, and issued by Python
where it is not.

    attend(0)                           by Python: it starts the microbatch. Then the cohort's other operations are
                                        written down, for all layers at once
    attend(1), dispatch, experts, ...   by the loop (tape_loop), unless there is only Python for them
    finish                              by Python

What is decided and enqueued is what Run decides and enqueues; the state lies in arrays that both sides read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from pipemoe.comm.transport import WaveSums
from pipemoe.plan.schedule import Op, OpKind
from pipemoe.runtime import tape_loop as loop
from pipemoe.runtime.run import Run
from pipemoe.runtime.tapes import NUM_NUMBERS, Tapes, write_launches
from pipemoe.runtime.wave_buffers import WaveBuffers
from pipemoe_kernels.launch import driver
from pipemoe_kernels.launch.packed_launch import recorded
from pipemoe_kernels.launch.tape import NotRecordable


class _RingEvent:
    """An event of the loop's, for work that Python issues."""

    __slots__ = ("_handle", "lane")

    def __init__(self, handle: int, lane: Any) -> None:
        self._handle, self.lane = handle, lane

    def let_wait(self, stream: int) -> None:
        driver.wait_event(stream, self._handle)

    def done(self) -> bool:
        return driver.has_passed(self._handle)


class TapedRun(Run):
    """See Run; not for timed runs."""

    def __init__(self, *arguments: Any, tapes: Tapes, **options: Any) -> None:
        """arguments, options: Run's."""
        super().__init__(*arguments, **options)
        self._tapes = tapes
        tapes.tape.begin_run()
        plan, cohorts = self._plan, self._plan.cohorts
        num_waves = [len(cohort.waves) for cohort in cohorts]
        first_wave = [0, *np.cumsum(num_waves).tolist()]
        self._arrays = a = loop.new_state(
            plan.order,
            plan.waits,
            layers=plan.shape.num_layers,
            waves=first_wave[-1],
            buffers=plan.config.num_buffers,
            lanes=len(tapes.lanes),
            kinds=max(1, len(tapes.layer_of_kind)),
            numbers=NUM_NUMBERS,
        )
        a.cohorts[:, loop.AT] = a.begin[:-1]
        a.cohorts[:, loop.SLOT] = [cohort.slot for cohort in cohorts]
        a.cohorts[:, loop.NUM_WAVES] = num_waves
        a.cohorts[:, loop.FIRST_WAVE] = first_wave[:-1]
        a.own[:], a.functions[:] = tapes.rings, tapes.functions
        a.lanes[:, loop.STREAM] = [lane.handle for lane in tapes.lanes]
        self._python_events: dict[int, Any] = {}  # of operations that Python has issued and that are under way
        self._is_whole = self._only.computation and self._only.communication

    def advance(self) -> bool:
        """See Run.advance. Gives back control after BREATH_NS, unless one call takes longer."""
        op = None
        try:
            while True:
                self._on_progress(_Current(self))
                reason = loop.play(self._arrays, self._tapes.tape.rows, loop.BREATH_NS, loop.SPIN_NS)
                self.issued_seconds += 1e-9 * int(self._arrays.out[loop.ISSUE_NS])
                self._note_done()
                if reason == loop.FAILED:
                    op = self._current()
                    raise self._failed_call()
                if reason != loop.FOR_PYTHON:
                    break
                op = self._current()
                self._issue_by_python(op)
                op = None
        except BaseException:
            self.failed_op = self.failed_op or op or self._current()
            raise
        return reason == loop.WAITS and self.oldest() is None and self.not_begun() is None

    def oldest(self) -> Op | None:
        position = int(self._arrays.out[loop.OLDEST])
        return self._ops[position] if position >= 0 else None

    def not_begun(self) -> str | None:
        a = self._arrays
        left = a.cohorts[:, loop.AT] < a.begin[1:]
        return str(self._ops[a.turn[a.cohorts[left, loop.AT]].min()]) if left.any() else None

    def _current(self) -> Op:
        return self._ops[int(self._arrays.out[loop.CURRENT])]

    def _note_done(self) -> None:
        for position in self._arrays.done[: self._arrays.out[loop.NUM_DONE]].tolist():
            op, event = self._ops[position], self._python_events.pop(position, None)
            state = self._cohorts[op.cohort]
            if op.kind is OpKind.FINISH and state.has_tokens:
                self._of_source(state, partial(self._tell_finished, op.cohort, event))
                self.own_finished += 1
            self._on_progress_made()
            self.of_caller(partial(self._on_done, op))

    def _failed_call(self) -> Exception:
        """The error of the call that has stopped the loop."""
        out, tape = self._arrays.out, self._tapes.tape
        status, at = int(out[loop.STATUS]), int(out[loop.ROW_AT])
        name = tape.names[int(tape.rows[at, 1])] if at >= 0 else "an event's call"
        return RuntimeError(f"{name} in {self._current()} of rank {self._rank} failed: {driver.words(status)}")

    # Between the loop's arrays and Run's objects.

    def _event(self, ref: int) -> Any:
        """What a reference names, for work that Python issues; None if it is done."""
        a = self._arrays
        lane, number = loop.parts_of_reference(int(ref))
        if ref < 0 or number < a.lanes[lane, loop.HEAD]:
            return None
        place = number % loop.RING
        event = self._python_events.get(int(a.ops[lane, place]))
        return event or _RingEvent(int(a.ring[lane, place]), self._tapes.lanes[lane])

    def _push(self, lane: int, position: int, event: Any) -> int:
        """Put an operation that Python has issued into its lane; the reference."""
        a = self._arrays
        number = int(a.lanes[lane, loop.TAIL])
        place = number % loop.RING
        a.ring[lane, place], a.ops[lane, place] = event.handle, position
        a.lanes[lane, loop.TAIL] = number + 1
        self._python_events[position] = event
        return loop.reference(lane, number)

    def _issue_by_python(self, op: Op) -> None:
        a, state, position = self._arrays, self._cohorts[op.cohort], int(self._arrays.out[loop.CURRENT])
        of_cohort = a.cohorts[op.cohort]
        slot = self._plan.cohorts[op.cohort].slot
        state.results = []  # work of the same lane comes before anyway
        if op.kind is OpKind.ATTEND:
            for e, layer in self._attends_before(op):
                self._attended[e, layer] = self._event(a.attended[e, layer])
        if op.kind is OpKind.FINISH:
            for e in self._plan.causal_predecessors[op.cohort]:
                self._finished[e] = self._event(a.finished[e])
        self._on_progress(op)
        begin = time.perf_counter()
        event = self._issue(op)
        if op.kind is not OpKind.FINISH:
            self.issued_seconds += time.perf_counter() - begin
        ref = self._push(slot, position, event)
        of_cohort[loop.AT] += 1
        if op.kind is OpKind.ATTEND:
            a.attended[op.cohort, op.layer] = ref
            of_cohort[loop.ATTENDED] = op.layer + 1
            if op.layer == 0:
                self._write_down(op.cohort)
            if state.failure is not None:
                self._leave_to_python(op.cohort)
        elif op.kind is OpKind.DISPATCH:
            of_cohort[loop.GROUPS] += 1
        elif op.kind is OpKind.FINISH:
            a.finished[op.cohort] = ref
            of_cohort[loop.IS_FINISHED] = 1

    # Writing a cohort's operations down.

    def _leave_to_python(self, c: int) -> None:
        a = self._arrays
        waves = self._waves_of(c)
        a.attend_pieces[c], a.side_pieces[c] = loop.NOTHING, 0
        a.wave_pieces[waves], a.expert_pieces[waves] = loop.NOTHING, loop.NOTHING

    def _waves_of(self, c: int) -> slice:
        first = int(self._arrays.cohorts[c, loop.FIRST_WAVE])
        return slice(first, first + len(self._plan.cohorts[c].waves))

    def _write_down(self, c: int) -> None:
        """Write the operations of a cohort whose layer 0 has been attended; what cannot be written stays as it is."""
        state, plan = self._cohorts[c], self._plan
        if not self._is_whole or state.failure is not None:
            return
        begin = time.perf_counter()
        self._write_attention(c, state)
        for wave in range(len(plan.cohorts[c].waves)):
            layers = range(min(plan.config.num_buffers, plan.shape.num_layers))  # use all buffers that the wave will
            views_of = {
                plan.buffer(c, layer, wave): self._place(Op(OpKind.EXPERTS, c, layer, wave))[0] for layer in layers
            }
            self._write_wave(c, wave, views_of)
        if self._source.has_side_work or self._writes_in_place(c, state):
            self._keep_with_attention(c)
        if state.failure is not None:
            self._leave_to_python(c)
        self.issued_seconds += time.perf_counter() - begin

    def _keep_with_attention(self, c: int) -> None:
        """Side work comes with the first wave's dispatch, and Python's knows of Python's attention only. Rows written
        in place are there after attention, whoever issues it, but Python's dispatch knows of Python's only.
        """
        a, w = self._arrays, self._waves_of(c).start
        buffers = {self._plan.buffer(c, layer, 0) for layer in range(self._plan.shape.num_layers)}
        is_attended, dispatches = a.attend_pieces[c, -1, 0] >= 0, a.wave_pieces[w, sorted(buffers), loop.PACK, 0]
        if (dispatches < 0).any() or (self._source.has_side_work and not is_attended):
            a.attend_pieces[c] = a.wave_pieces[w, :, loop.PACK] = loop.NOTHING

    def _write_attention(self, c: int, state: Any) -> None:
        a, slot = self._arrays, self._plan.cohorts[c].slot
        rows_of = []
        if self._writes_in_place(c, state):
            buffers = range(self._plan.config.num_buffers)
            rows_of = [self._place(Op(OpKind.DISPATCH, c, layer, 0))[0].own[0][1] for layer in buffers]
        lane = self._tapes.lanes[slot]
        with _on(lane):
            graphs = self._of_source(state, partial(self._source.graphs, c, rows_of))
        if graphs is not None:
            a.attend_pieces[c], a.side_pieces[c] = self._tapes.of_graphs(slot, lane.handle, graphs)

    def _write_wave(self, c: int, wave: int, views_of: dict[int, WaveBuffers]) -> None:
        """views_of: the wave in each of the buffers that it uses."""
        a, w = self._arrays, self._waves_of(c).start + wave
        for buffer, views in views_of.items():
            self._write_dispatch(c, w, buffer, views)
        in_place = all([self._write_combine(c, w, buffer, views) for buffer, views in views_of.items()])
        found = []
        for buffer, views in views_of.items():
            out = self._whole(c, views) if in_place else views.partial
            try:
                with _on(self._tapes.lanes[views.slot]):
                    of_buffer, a.numbers[w, buffer] = self._tapes.of_experts(
                        self._experts, views.slot, views.rows, out, views.scratch
                    )
                found.append(of_buffer)
            except NotRecordable:
                pass
        if len(found) == len(views_of) and all(of_buffer is found[0] for of_buffer in found):
            a.expert_pieces[w, :, :2], a.expert_pieces[w, :, 2] = found[0], self._tapes.kind_of_layer
        elif in_place:  # the experts that Python calls write partial sums, which must be copied
            a.wave_pieces[w, :, loop.COMBINE] = loop.NOTHING

    def _write_dispatch(self, c: int, w: int, buffer: int, views: WaveBuffers) -> None:
        """Rows do not travel, but they must lie where the experts read them."""
        piece = self._arrays.wave_pieces[w, buffer, loop.PACK]
        if self._writes_in_place(c, self._cohorts[c]):
            piece[:] = 0
        elif self._arrays.attend_pieces[c, -1, 0] >= 0:  # else rows are other tensors in every layer
            with self._piece(views.slot, piece):
                self._write_pack(c, views)

    def _write_combine(self, c: int, w: int, buffer: int, views: WaveBuffers) -> bool:
        """Are there no sums to copy or send, because experts can write the results?"""
        piece, state = self._arrays.wave_pieces[w, buffer, loop.COMBINE], self._cohorts[c]
        in_place = self._whole(c, views) is not None
        with self._piece(views.slot, piece):
            if not in_place:
                results = [self._results(c, state, segment) for segment, _ in views.own]
                sums = WaveSums(views.partial, results, views.staging)
                self._tapes.transport.combine(
                    views.slot, buffer, views.wave, views.exchange, self._plan.config.combine, sums
                )
        return in_place

    def _write_pack(self, c: int, views: WaveBuffers) -> None:
        if views.has_padding:
            raise NotRecordable("padding is filled by torch")
        with recorded() as launches:
            for segment, part in views.own:
                rows = self._ask(c, partial(self._source.rows, c, segment.start, segment.stop))
                if not part.is_packed(*rows):
                    raise NotRecordable("rows that are converted")
                part.write(*rows)
        write_launches(self._tapes.tape, launches)

    def _ask(self, c: int, question: Callable[[], Any]) -> Any:
        """The source's answer."""
        answer = self._of_source(self._cohorts[c], question)
        if answer is None:
            raise NotRecordable("the source has failed")
        return answer

    def _whole(self, c: int, views: WaveBuffers) -> Any:
        """All the wave's results as one tensor, where experts can write them at once. Else None."""
        first, last = views.own[0][0], views.own[-1][0]
        state, results = self._cohorts[c], []
        for start, stop in [(first.start, last.stop), *((s.start, s.stop) for s, _ in views.own)]:
            results.append(self._of_source(state, partial(self._source.results, c, start, stop)))
        if state.failure is not None:
            return None
        whole, *parts = results
        begins = [whole.data_ptr(), *(part.data_ptr() + part.nbytes for part in parts)]
        is_one = [part.data_ptr() for part in parts] == begins[:-1]
        is_like = whole.dtype == views.partial.dtype and whole.shape == views.partial.shape
        return whole if is_one and is_like and whole.is_contiguous() else None

    @contextmanager
    def _piece(self, slot: int, piece: np.ndarray) -> Iterator[None]:
        """What is written inside becomes the piece; what cannot be written leaves it as it is."""
        tape = self._tapes.tape
        tape.for_this_run = True
        begin = tape.here()
        try:
            with _on(self._tapes.lanes[slot]):
                yield
            piece[:] = begin, tape.here()
        except NotRecordable:
            pass
        finally:
            tape.for_this_run = False


class _Current:
    """Names the operation that the loop is at, when it is asked."""

    def __init__(self, run: TapedRun) -> None:
        self._run = run

    def __str__(self) -> str:
        return str(self._run._current())


@contextmanager
def _on(lane: Any) -> Iterator[None]:
    """torch's current stream is the lane's."""
    import torch

    torch.cuda.set_stream(lane.stream)
    try:
        yield
    finally:
        torch.cuda.set_stream(torch.cuda.default_stream(lane.stream.device))
