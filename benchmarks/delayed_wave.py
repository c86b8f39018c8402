"""A wave whose rows come in groups, computed in one of several forms, on one GPU without peers. See arrivals.py."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.kernels.cases import Layer, make_rows
from pipemoe.comm.nccl import default_max_ctas
from pipemoe.plan.clock.sms import room_for_collectives

NUM_SLOTS = 2  # whose collectives may run beside the experts
DEVICE = "cuda"
FLUSH_VALUES = 64 << 20  # float32 numbers, read before a round: the L2 cache then holds nothing of the last one
HEAD_START_CYCLES = 6_000_000  # about 3 ms, in which the host enqueues a whole round


class Form(NamedTuple):
    """How a wave travels and is computed. groups: rows of each group of broadcasts. calls: which rows each call takes,
    and behind which group (-1: they are there). reduces: behind which call each group of reduces is sent, and its rows.
    """

    name: str
    groups: list[int]
    calls: list[tuple[slice, int]]
    reduces: list[tuple[int, int]]

    def parts(self, num_rows: int) -> list[tuple[int, int]]:
        """Rows that are there together, in order, and behind which group."""
        parts = [(rows.stop - rows.start, group) for rows, group in self.calls]
        return [(num_rows - self.groups[0], -1), (self.groups[0], 0)] if len(parts) == 1 else parts


def forms_of(num_rows: int, own_rows: int, groups: Sequence[int], passes: Sequence[int]) -> list[Form]:
    """All forms of a wave of `num_rows` rows, of which the first `own_rows` are this rank's."""
    found = [Form("whole", [num_rows - own_rows], [(slice(0, num_rows), 0)], [(0, num_rows)])]
    for count in groups:
        of_others = split(num_rows - own_rows, count)
        calls = [(rows, number - 1) for number, rows in enumerate(_slices([own_rows, *of_others]))]
        found.append(Form(f"own first, {count}", of_others, calls, [(count, num_rows)]))
    for count in passes:
        sizes = split(num_rows, count)
        calls = [(rows, number) for number, rows in enumerate(_slices(sizes))]
        found.append(Form(f"passes, {count}", sizes, calls, list(enumerate(sizes))))
    return found


def _slices(sizes: Sequence[int]) -> list[slice]:
    return [slice(*pair) for pair in itertools.pairwise([0, *itertools.accumulate(sizes)])]


def split(num_rows: int, num_parts: int) -> list[int]:
    """Rows of each of `num_parts` parts, as equal as possible."""
    bounds = [num_rows * i // num_parts for i in range(num_parts + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def list_schedule(tiles: Sequence[tuple[float, tuple[int, int]]], times: tuple[float, float], num_sms: int) -> float:
    """End of a schedule of two GEMMs' tiles on `num_sms` multiprocessors, in ms.

    tiles: for each row tile, when its rows are there, and how many tiles of columns it has in each GEMM (a row tile of
    the second one may start when the first one's tiles of the same rows are done). times: of a tile of each GEMM.
    """
    free = [0.0] * num_sms
    waiting = [(there, 0, number) for number, (there, counts) in enumerate(tiles) for _ in range(counts[0])]
    heapq.heapify(waiting)
    left = [counts[0] for _, counts in tiles]
    end = 0.0
    while waiting:
        there, gemm, number = heapq.heappop(waiting)
        stop = max(there, heapq.heappop(free)) + times[gemm]
        heapq.heappush(free, stop)
        end = max(end, stop)
        if gemm == 0:
            left[number] -= 1
            if not left[number]:  # tiles of one row tile start in order, so this one ends last
                for _ in range(tiles[number][1][1]):
                    heapq.heappush(waiting, (stop, 1, number))
    return end


class DelayedWave:
    """One wave, its receive buffer, and two streams that stand for the dispatch and the combine."""

    latency_us = 0.0

    def __init__(self, layer: Layer, num_tokens: int, num_ranks: int, weights: Any, gbps: float):
        import torch

        from pipemoe.experts import make_experts
        from pipemoe.runtime.stream_lanes import stream_lanes
        from pipemoe.wire import WireFormat

        self.layer, self.gbps = layer, gbps
        self.wire = wire = WireFormat(layer.hidden, layer.top_k, torch.bfloat16)
        self.source = make_rows(layer, num_tokens, torch.device(DEVICE))
        self.received = wire.rows(torch.zeros_like(self.source.buffer))
        settings = {"top_k": layer.top_k, "hidden": layer.hidden, "device": DEVICE, "dtype": torch.bfloat16}
        experts = make_experts([weights], implementation="hopper", num_experts=layer.num_experts, **settings)
        self.sms_left = room_for_collectives(
            experts.num_sms, default_max_ctas(experts.num_sms, NUM_SLOTS, 1), NUM_SLOTS
        )
        self.experts = experts.with_free_sms(self.sms_left)
        self.scratch = self.experts.new_scratch(num_tokens)
        self.experts.warm_up(self.scratch)  # its kernels are built side by side
        self.out = torch.zeros((num_tokens, layer.hidden), dtype=torch.bfloat16, device=DEVICE)
        self.flush = torch.zeros(FLUSH_VALUES, device=DEVICE)
        self.total = torch.zeros((), device=DEVICE)
        lanes = stream_lanes(torch.device(DEVICE), 1).slots[0]
        self.dispatch, self.combine = lanes.dispatch.stream, lanes.combine.stream
        self.cycles_of_ms = _cycles_of_ms()
        self.own_rows = split(num_tokens, num_ranks)[0]
        self.combine_ms, self.index_ms = self._combine_ms(), self._index_ms()
        self.launch_ms = _median_ms(lambda: self._wait(1e-5))
        torch.cuda.synchronize()

    def _bring(self, rows: slice) -> None:
        self.received.buffer[rows].copy_(self.source.buffer[rows])

    def _group_ms(self, num_bytes: int) -> float:
        return self.latency_us / 1e3 + num_bytes / self.gbps / 1e6

    def _wait(self, ms: float) -> None:
        import torch

        if ms > 0:
            torch.cuda._sleep(int(ms * self.cycles_of_ms))

    def _transfer(self, num_bytes: int) -> None:
        self._wait(self._group_ms(num_bytes) - self.launch_ms)

    def round(self, form: Form | None, *, copies: bool = False) -> tuple[Any, Any, Any, Any]:
        """Enqueue a wave in a form; None: one call with all rows there. Returns events of its start, of the end of its
        experts, of its last reduce, and of the last group's arrival.
        """
        import torch

        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self.flush, dim=0, out=self.total)
        if copies:
            self._bring(slice(0, self.own_rows))
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        if form is None:
            self.experts(0, self.source, self.out, self.scratch)
            stop.record()
            return start, stop, stop, stop
        calls: list[Any] = []  # events behind them
        there: list[Any] = []
        reduced = torch.cuda.Event(enable_timing=True)
        compute = torch.cuda.current_stream()
        for number, (rows, group) in enumerate(form.calls):
            if group >= 0:
                with torch.cuda.stream(self.dispatch):
                    self.dispatch.wait_event(calls[group - 2] if group > 1 and len(form.reduces) > 1 else start)
                    self._transfer(form.groups[group] * self.wire.row_bytes)
                    if copies:
                        self._bring(rows)
                    there.append(torch.cuda.Event(enable_timing=True))
                    there[-1].record()
                compute.wait_event(there[-1])
            self.experts(0, self.received[rows], self.out[rows], self.scratch)
            calls.append(torch.cuda.Event())
            calls[-1].record()
            for behind, num_rows in form.reduces:
                if behind == number:
                    with torch.cuda.stream(self.combine):
                        self.combine.wait_event(calls[-1])
                        self._transfer(num_rows * self.layer.hidden * self.out.element_size())
                        reduced.record()
        stop.record()
        return start, stop, reduced, there[-1]

    def bound_ms(self, form: Form, resident_ms: float) -> float:
        """See the top."""
        import numpy as np

        shape = self.experts._shape(0, len(self.source))
        layer, ids = self.layer, self.source.ids.cpu().numpy()
        parts = form.parts(len(self.source))
        ends = np.cumsum([num_rows for num_rows, _ in parts])
        arrived = [*itertools.accumulate(self._group_ms(rows * self.wire.row_bytes) for rows in form.groups), 0.0]
        there = [arrived[group] for _, group in parts]  # of group -1 the last: at once
        columns = (-(-layer.intermediate * 2 // 256), -(-layer.hidden // 256))
        tiles = []
        for expert in range(layer.num_local_experts):
            tokens = np.nonzero((ids == expert).any(1))[0]
            for first in range(0, len(tokens), shape.rows):
                last = tokens[min(first + shape.rows, len(tokens)) - 1]
                tiles.append((there[int(np.searchsorted(ends, last, side="right"))], columns))
        ratio = layer.intermediate / layer.hidden  # of the second GEMM's tiles, by their steps

        def end(of_tile: float, resident: bool) -> float:
            known = [(0.0, counts) for _, counts in tiles] if resident else tiles
            return list_schedule(known, (of_tile, of_tile * ratio), self.experts.num_sms)

        gemms_ms = max(1e-3, resident_ms - self.index_ms - self.combine_ms)
        return end(gemms_ms / end(1.0, True), False) + self.combine_ms

    def _combine_ms(self) -> float:
        from pipemoe_kernels.combine_lanes import combine_lanes
        from pipemoe_kernels.launch.kernel import Stream

        self.experts(0, self.source, self.out, self.scratch)
        rows, num_rows = self.source, len(self.source)
        y, positions = self.scratch.y[: num_rows * self.layer.top_k], self.scratch.positions[:num_rows]
        return _median_ms(
            lambda: combine_lanes(
                Stream.current(y.device), y, positions, rows.ids, 0, rows.weights, None, self.out, may_start_early=False
            )
        )

    def _index_ms(self) -> float:
        from pipemoe_kernels.index.hopper import index_local_pairs
        from pipemoe_kernels.launch.kernel import Stream

        scratch, rows, num_local = self.scratch, self.source, self.layer.num_local_experts
        positions, offsets = scratch.positions[: len(rows)], scratch.offsets[:num_local]
        how = (0, num_local, scratch.block_counts, offsets, positions, scratch.tokens)
        return _median_ms(lambda: index_local_pairs(Stream.current(rows.ids.device), rows.ids, *how))


def _median_ms(work: Callable[[], None]) -> float:
    """What a piece of work takes on the GPU."""
    import torch

    found = []
    for _ in range(5):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(stop))
    return statistics.median(found)


def _cycles_of_ms() -> float:
    """Cycles of torch.cuda._sleep in a millisecond."""
    cycles = 2_000_000
    import torch

    return cycles / _median_ms(lambda: torch.cuda._sleep(cycles))
