"""The run of a plan by ranks that share memory, whose operations are played by compiled code (PlayedPlan).

    attend(0)                           by Python: it starts the microbatch. Then the source says what can be called
    attend(1), dispatch, experts, ...   by compiled code, if the source has calls for it; experts always
    finish                              by Python

Each slot's records are played by the thread that does the slot's work (runtime.host_lanes). It gives back control for
what is left to Python, and now and then.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np

from pipemoe.comm.shared import player as of
from pipemoe.comm.shared.bells import LONGEST_SLEEP
from pipemoe.comm.shared.player import Player
from pipemoe.comm.shared.waves import add_in_order
from pipemoe.plan.schedule import Op, OpKind
from pipemoe.runtime.played_plan import PlayedPlan, PlayedSlot
from pipemoe.runtime.run import Run

_BREATH_SECONDS = 0.01  # the conductor's thread looks after its peers as often


class Spanned:
    """An operation's event, when it is over."""

    __slots__ = ("_span",)

    def __init__(self, begin: float, end: float) -> None:
        self._span = begin, end

    def span(self) -> tuple[float, float]:
        return self._span

    def end(self) -> float:
        return self._span[1]


class PlayedRun(Run):
    """See Run."""

    _lanes: Any  # HostLanes
    _transport: Any  # SharedWaves

    def __init__(self, *arguments: Any, played: PlayedPlan, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._played, bells = played, self._transport.bells
        self._spans = np.zeros((len(self._ops), 2), np.int64)
        self._kept: list[Any] = []  # what the calls of the source need
        self._errors: list[tuple[Op, BaseException]] = []  # of slots' threads
        self._left: list[int] = []  # slots whose threads have nothing left to do
        self._noted = {slot: [0, 0] for slot in played.slots}  # operations, by queue
        self._is_prepared: set[int] = set()  # cohorts
        self.spins = self._is_inline = len(played.slots) == 1
        self._players: dict[int, Player] = {}
        others = [slot for slot in played.slots.values() if slot.waits_for_others]
        for number, slot in played.slots.items():
            records, waits = slot.for_step()
            self._players[number] = Player(
                records,
                waits,
                slot.done,
                bells,
                number,
                slot.bells,
                [(other.done.ctypes.data + of.WAITS_HERE, other.number) for other in others if other is not slot],
                self._spans,
                is_thread=not self._is_inline,
                num_cores=self._lanes.num_cores,
                is_timed=self._timed,
            )
        if not self._is_inline:
            for number in played.slots:
                self._lanes.play(number, partial(self._play_in_thread, number))

    def advance(self) -> bool:
        """See Run.advance. If there is one slot, this thread plays it for a while, and sleeps while nothing goes on."""
        op = None
        try:
            self._on_progress(_Oldest(self))
            if self._is_inline:
                for number in self._players:
                    self._play(number, _BREATH_SECONDS)
            is_over = self._is_over()  # before looking what is done
            self._note_done()
            if self._errors:
                op, error = self._errors[0]
                raise error
        except BaseException:
            self.failed_op = self.failed_op or op
            raise
        if is_over and self._timed and not self.completed:
            self._take_spans()
        return is_over

    def _is_over(self) -> bool:
        """Also of threads: until they have left, they read what the plan's next run writes."""
        if self._is_inline:
            return all(player.is_over() for player in self._players.values())
        return len(self._left) == len(self._players)

    def oldest(self) -> Op | None:
        heads = []
        for number, player in self._players.items():
            for queue, ops in enumerate(self._played.slots[number].ops):
                at = player.num_done(queue)
                if at < len(ops):
                    heads.append(self._of_head(ops[at], player.records[queue][at], player.waits))
        return min(heads, key=self._position.__getitem__, default=None)

    @staticmethod
    def _of_head(op: Op, record: np.ndarray, waits: np.ndarray) -> Op:
        """What a queue's first record waits for: experts may wait for other ranks' rows."""
        wait = record[of.WAIT]  # read once: a slot's thread may count it up meanwhile
        if op.kind is OpKind.EXPERTS and wait < record[of.LAST_WAIT] and waits[wait, of.KIND] == of.A_FLAG:
            return op._replace(kind=OpKind.DISPATCH)
        return op

    def not_begun(self) -> str | None:
        return None

    def _play_in_thread(self, number: int) -> bool:
        """Play a slot's records for a while. True if they are over."""
        try:
            is_over = self._play(number, LONGEST_SLEEP) == of.IS_OVER
        except BaseException as error:  # noqa: BLE001  (raised where the conductor looks)
            queue, at = self._players[number].stopped_at
            self._errors.append((self._played.slots[number].ops[queue][at], error))
            is_over = True
        if is_over:
            self._left.append(number)
            self._lanes.wake.set()
        return is_over

    def _play(self, number: int, seconds: float) -> int:
        """The reason why the player gave back control."""
        player, slot = self._players[number], self._played.slots[number]
        while (reason := player.play(seconds)) == of.STOPPED:
            queue, at = player.stopped_at
            op = slot.ops[queue][at]
            begin = time.perf_counter()
            try:
                self._do(op, player, slot)
            except BaseException:
                self.failed_op = op
                raise
            self._spans[self._position[op]] = int(begin * 1e9), int(time.perf_counter() * 1e9)
            player.tell_done(queue, at)
            if op.kind is OpKind.FINISH:  # the caller waits for it
                if self._is_inline:
                    return of.BREATH
                self._lanes.wake.set()
        return reason

    def _do(self, op: Op, player: Player, slot: PlayedSlot) -> None:
        """An operation that is left to Python. Only a cohort with rows of this rank has such."""
        source, state, c = self._source, self._cohorts[op.cohort], op.cohort
        if op.kind is OpKind.ATTEND:
            self._of_source(state, partial(source.attend, c, op.layer))
            if op.layer == 0:
                self._of_source(state, partial(self._prepare, c, player, slot))
        elif op.kind is OpKind.FINISH:
            if c in self._is_prepared:
                source.is_at(c, self._plan.shape.num_layers - 1)
            self._of_source(state, partial(source.finish, c))
        else:
            calls = self._played.wave_calls(op)
            assert calls is not None
            if op.kind is OpKind.DISPATCH:
                self._pack(op, state, calls.views)  # type: ignore[arg-type]
                return
            results = [self._results(c, state, segment) for segment, _ in calls.views.own]
            for parts, result in zip(calls.views.parts, results, strict=True):
                add_in_order(parts, result)

    def _prepare(self, c: int, player: Player, slot: PlayedSlot) -> None:
        """Let compiled code make the source's calls, as far as it has some. Rows and results of a source that keeps
        tensors lie where they lay in layer 0.
        """
        source, num_layers = self._source, self._plan.shape.num_layers
        calls = source.prepared(c)
        self._kept.append(calls)
        places = self._played.place
        of_op: dict[Op, Any] = {}
        if calls:
            self._is_prepared.add(c)
            for layer in range(1, num_layers):
                of_op[self._played.attends[c, layer]] = calls[layer]
        for (cohort, wave, buffer), of_wave in self._played.calls.items():
            if cohort != c or of_wave is None or of_wave.pack is None or of_wave.add is None:
                continue
            segments = [segment for segment, _ in of_wave.views.own]
            packs = calls and of_wave.pack.come_from([source.rows(c, s.start, s.stop) for s in segments])
            adds = of_wave.add.go_to([source.results(c, s.start, s.stop) for s in segments])
            for layer in range(num_layers):
                if self._plan.buffer(c, layer, wave) != buffer:
                    continue
                if packs:
                    of_op[Op(OpKind.DISPATCH, c, layer, wave)] = [of_wave.pack.call]
                if adds:
                    of_op[Op(OpKind.COMBINE, c, layer, wave)] = [of_wave.add.call]
        for op, of_this in of_op.items():
            _, queue, at = places[op]
            flat = [word for call in of_this for word in call[:2]]
            player.records[queue][at, of.CALL : of.CALL + len(flat)] = flat

    def _note_done(self) -> None:
        for number, player in self._players.items():
            slot, noted = self._played.slots[number], self._noted[number]
            for queue in (of.SUMS, of.COMPUTATIONS):
                done = player.num_done(queue)
                for op in slot.ops[queue][noted[queue] : done]:
                    self._note(op)
                noted[queue] = done

    def _note(self, op: Op) -> None:
        state = self._cohorts[op.cohort]
        if self._transport.log is not None:
            self._write_log(op)
        if op.kind is OpKind.FINISH and state.has_tokens:
            end = float(self._spans[self._position[op], 1]) * 1e-9
            self._of_source(state, partial(self._tell_finished, op.cohort, Spanned(end, end)))  # type: ignore[arg-type]
            self.own_finished += 1
        self._on_progress_made()
        self.of_caller(partial(self._on_done, op))

    def _write_log(self, op: Op) -> None:
        calls = self._played.wave_calls(op)
        if calls is None:
            return
        views, waves = calls.views, self._transport
        if op.kind is OpKind.DISPATCH:
            waves.note_dispatch(views.slot, views.buffer, views.wave, views.exchange, self._wire.row_bytes)
        elif op.kind is OpKind.COMBINE:
            combine = self._plan.config.combine
            waves.note_combine(views.slot, views.buffer, views.wave, views.exchange, combine, views.partial)

    def _take_spans(self) -> None:
        """Of all operations. A dispatch lasts until the experts have all rows, and have nothing else to do."""
        spans = self._spans * 1e-9
        for op in self._ops:
            begin, end = spans[self._position[op]].tolist()
            if op.kind in (OpKind.DISPATCH, OpKind.COMBINE):
                experts = spans[self._position[op._replace(kind=OpKind.EXPERTS)]].tolist()
            if op.kind is OpKind.DISPATCH:
                begin, end = end, max(end, experts[0])
            elif op.kind is OpKind.COMBINE:  # of no rows of this rank: nothing was done
                begin, end = max(begin, experts[1]), max(end, experts[1])
            self.completed.append((op, Spanned(begin, end)))  # type: ignore[arg-type]
            self.issue_seconds.append((op, 0.0))


class _Oldest:
    """Names the operation that a run is at, when it is asked."""

    def __init__(self, run: PlayedRun) -> None:
        self._run = run

    def __str__(self) -> str:
        return str(self._run.oldest())
