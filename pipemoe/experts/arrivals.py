"""Experts that take a wave's rows as they arrive, in parts: one launch instead of one call per part.

    lane of the dispatch   rows of part 0 | arrived(0): index, flag | rows of part 1 | arrived(1) | ...
    lane of the experts    gate_up: waits for flags, takes what is there | down | combine

The result has the same bits as a call on the whole wave at once. Weights are read once for all parts that arrive while
the GPU is busy with others.

Callers keep to three rules, or the GPU stands still:
- Everything that a flag waits for is enqueued before the experts call (which checks that), and never waits for it.
- The experts leave room to all collectives that may be under way (`Experts.with_free_sms`). This class leaves room for
the
  index.
- All cohorts of a GPU share one object of this class: it lets only one call at a time wait for parts.

A call whose parts do not come spins until the lane that should bring them goes on. An aborted collective goes on, and
the flags behind it are written. The end of the process ends the call too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import ConfigError, InputError
from pipemoe.experts.hopper import HopperExperts, HopperScratch
from pipemoe.experts.protocol import Recordable, column_ranges
from pipemoe.plan.arrivals import INDEX_SMS
from pipemoe.wire import WireFormat
from pipemoe_kernels.combine import combine_rows
from pipemoe_kernels.combine_lanes import combine_lanes, fits
from pipemoe_kernels.gemm.arrivals.gemm import MAX_OUT_BYTES, W_BOXES, arrivals_kernel, down_arrived, gate_up_arriving
from pipemoe_kernels.gemm.arrivals.parts import Parts
from pipemoe_kernels.gemm.arrivals.raster import MAX_PARTS
from pipemoe_kernels.index.hopper import MAX_BLOCKS, index_kernels, index_local_pairs
from pipemoe_kernels.launch import driver
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.launch.tensor_map import MAP_BYTES, device_maps, tensor_map

if TYPE_CHECKING:
    from pipemoe.wire import WireRows


def too_many_rows(experts: HopperExperts, max_rows: int) -> str | None:
    """Why waves of up to `max_rows` rows are too large for arrival-driven calls, or None."""
    widest = max(experts.hidden, experts.max_intermediate)
    if 2 * widest * experts.top_k * max_rows < MAX_OUT_BYTES:
        return None
    return (
        f"{max_rows} rows of {experts.top_k} pairs of {widest} columns; "
        "arrival-driven calls take less than 4 GiB of these: make waves smaller"
    )


class Arrivals:
    """The state of one receive buffer of up to `max_rows` rows: its parts, which of them are there, and their index.

    It serves one wave at a time, as the buffer does. The next wave's parts wait on the GPU until the call is over.
    """

    def __init__(self, experts: HopperExperts, max_rows: int):
        num_pairs, num_local = experts.max_pairs(max_rows), experts.max_local_experts

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=experts.device)

        self.max_rows = max_rows
        self.positions = zeros(max_rows, experts.top_k)
        self.tokens = zeros(num_pairs)
        self.ends = zeros(MAX_PARTS * num_local)
        self.block_counts = zeros(MAX_PARTS, MAX_BLOCKS * num_local)
        self.flags = zeros(MAX_PARTS)
        self.batches = zeros(MAX_PARTS, dtype=torch.int64)
        self.num_bytes = sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))
        self.free = torch.cuda.Event()  # recorded behind the last reader
        self.epoch = 0
        self.layer: int | None = None  # of the expected wave
        self.rows: WireRows | None = None
        self.first_rows: list[int] = []  # of each part; at the end the number of rows
        self.numbers: list[int | None] = []  # of each part, among those with rows
        self.missing: set[int] = set()


class ArrivingExperts:
    """Calls `experts` on CUDA rows that arrive in parts. Only enqueues, and allocates nothing.

    Raises ConfigError unless experts.supports_arrivals.
    """

    def __init__(self, experts: HopperExperts):
        if not experts.supports_arrivals:
            raise ConfigError(
                f'{experts.implementation} experts take whole waves only; arrival-driven calls need "hopper" experts'
            )
        self.experts = experts
        self._down_kernel = arrivals_kernel(gated=False)
        self._gate_up_kernels = [
            arrivals_kernel(gated=w.gated, has_bias=w.gate_up_bias is not None, activation=w.gating)
            for w in experts.weights
        ]
        with_experts = [w for w in experts.weights if w.num_local_experts]
        maps = [
            tensor_map(matrix.detach(), box) for w in with_experts for matrix in (w.gate_up, w.down) for box in W_BOXES
        ]
        self._maps = device_maps(maps, experts.device)
        self._map_of_layer: dict[int, int] = {}
        for layer, w in enumerate(experts.weights):
            if w.num_local_experts:
                self._map_of_layer[layer] = 2 * len(W_BOXES) * len(self._map_of_layer)
        self._turn = torch.cuda.Event()  # recorded when the last call has all its parts

    def new_arrivals(self, max_rows: int) -> Arrivals:
        """Allocate what waves of up to `max_rows` rows in one receive buffer need. Raises ConfigError for too many."""
        self.experts.check_max_rows(max_rows)
        if reason := too_many_rows(self.experts, max_rows):
            raise ConfigError(reason)
        return Arrivals(self.experts, max_rows)

    def warm_up(self, arrivals: Arrivals, scratch: HopperScratch, column_blocks: Sequence[int] = (1,)) -> None:
        """Run every kernel that these may launch, on the current stream, and synchronise."""
        experts = self.experts
        index = index_kernels(experts.top_k)
        for kernel in (index.alone, index.count, index.place):
            kernel.load(torch.cuda.current_device() if experts.device.index is None else experts.device.index)
        experts.warm_up(scratch, column_blocks)  # the combines
        wire = WireFormat(experts.hidden, experts.top_k, experts.wire_dtype)
        num_rows = min(1, scratch.max_rows, arrivals.max_rows)
        rows = wire.rows(torch.zeros((num_rows, wire.row_bytes), dtype=torch.uint8, device=experts.device))
        out = torch.empty((num_rows, experts.hidden), dtype=experts.out_dtypes[0], device=experts.device)
        for layer in {w.kind: layer for layer, w in enumerate(experts.weights)}.values():
            rows.ids.fill_(experts.weights[layer].first_expert)
            self.expect(arrivals, layer, rows, [num_rows])
            self.arrived(arrivals, 0)
            self(arrivals, out, scratch)
        torch.cuda.synchronize(experts.device)

    def expect(self, arrivals: Arrivals, layer: int, rows: WireRows, part_rows: Sequence[int]) -> None:
        """Begin a wave: `rows` will arrive as adjacent parts of `part_rows` rows each. Enqueues nothing.

        Raises InputError if the wave before has not been called for, if the counts are not those of the rows, or if
        more than MAX_PARTS parts have rows.
        """
        if arrivals.missing or arrivals.rows is not None:
            raise InputError(
                f"layer {layer}: the wave of layer {arrivals.layer} in this buffer has not been called for yet"
            )
        if min(part_rows, default=0) < 0 or sum(part_rows) != len(rows) or len(rows) > arrivals.max_rows:
            raise InputError(
                f"layer {layer}: {len(rows)} rows of at most {arrivals.max_rows} in parts of {list(part_rows)}"
            )
        num_parts = sum(count > 0 for count in part_rows)
        if num_parts > MAX_PARTS:
            raise InputError(f"layer {layer}: {num_parts} parts with rows; at most {MAX_PARTS} are possible: join some")
        arrivals.layer, arrivals.rows = layer, rows
        arrivals.first_rows, arrivals.numbers = [0], []
        for count in part_rows:
            arrivals.numbers.append(sum(number is not None for number in arrivals.numbers) if count else None)
            arrivals.first_rows.append(arrivals.first_rows[-1] + count)
        arrivals.missing = set(range(len(part_rows)))
        arrivals.epoch += 1

    def arrived(self, arrivals: Arrivals, part: int) -> None:
        """Enqueue the index of a part, and the flag that says it is there, behind its rows on torch's current stream.

        Raises InputError for a part that is not expected, or no longer.
        """
        if part not in arrivals.missing:
            raise InputError(
                f"layer {arrivals.layer}: part {part} is not among the expected {sorted(arrivals.missing)}"
            )
        layer, rows = arrivals.layer, arrivals.rows
        assert layer is not None and rows is not None  # `expect` has set them
        weights = self.experts.weights[layer]
        number, first, stop = arrivals.numbers[part], arrivals.first_rows[part], arrivals.first_rows[part + 1]
        arrivals.missing.remove(part)
        if number is None or not weights.num_local_experts:
            return
        torch.cuda.current_stream(rows.buffer.device).wait_event(arrivals.free)
        stream = Stream.current(rows.buffer.device)
        first_place, num_local = first * self.experts.top_k, weights.num_local_experts
        index_local_pairs(
            stream,
            rows.ids[first:stop],
            weights.first_expert,
            num_local,
            arrivals.block_counts[number],
            arrivals.ends[number * num_local : (number + 1) * num_local],
            arrivals.positions[first:stop],
            arrivals.tokens[first_place:],
            first_place=first_place,
        )
        driver.write_word(stream.handle, arrivals.flags.data_ptr() + 4 * number, arrivals.epoch)

    @torch.no_grad()
    def __call__(
        self,
        arrivals: Arrivals,
        out: torch.Tensor | Sequence[torch.Tensor],
        scratch: HopperScratch,
        events: Sequence[Recordable] = (),
    ) -> None:
        """The experts' own call, on the wave that `arrivals` expects, on torch's current stream.

        Raises InputError if `arrived` has not announced a part, and whatever the experts' own call raises.
        """
        if arrivals.rows is None or arrivals.missing:
            raise InputError(
                f"layer {arrivals.layer}: parts {sorted(arrivals.missing)} of the wave are not announced: call "
                "`arrived` first"
            )
        experts, layer, rows = self.experts, arrivals.layer, arrivals.rows
        assert layer is not None  # `expect` has set it
        blocks = experts.check_call(layer, rows, out, scratch.max_rows, max(1, len(events)))
        arrivals.rows = None
        weights = experts.weights[layer]
        num_rows, num_local = len(rows), weights.num_local_experts
        if num_rows == 0 or num_local == 0:
            experts.nothing_local(blocks, events)
            return
        current = torch.cuda.current_stream(rows.buffer.device)
        stream = Stream.current(rows.buffer.device)
        num_pairs, intermediate = num_rows * experts.top_k, weights.intermediate
        numbers = zip(arrivals.numbers, arrivals.first_rows, strict=False)
        parts = Parts(
            [first for number, first in numbers if number is not None],
            experts.top_k,
            arrivals.tokens,
            arrivals.ends[: MAX_PARTS * num_local].view(MAX_PARTS, num_local),
            arrivals.flags,
            arrivals.batches,
            arrivals.epoch,
        )
        a = scratch.a[: num_pairs * intermediate].view(num_pairs, intermediate)
        maps = self._maps.data_ptr() + MAP_BYTES * self._map_of_layer[layer]
        grid = max(1, experts.num_sms - INDEX_SMS)
        current.wait_event(self._turn)
        gate_up_arriving(stream, self._gate_up_kernels[layer], rows.hidden, parts, maps, weights.gate_up_bias, a, grid)
        self._turn.record(current)
        down_maps = maps + MAP_BYTES * len(W_BOXES)
        positions = arrivals.positions[:num_rows]
        for block, columns in enumerate(column_ranges(experts.hidden, len(blocks))):
            in_block = slice(columns.start, columns.stop)
            y, out_block = scratch.y[:num_pairs, in_block], blocks[block]
            down_arrived(stream, self._down_kernel, a, parts, down_maps, y, experts.num_sms, columns.start)
            bias = None if weights.down_bias is None else weights.down_bias[:, in_block]
            combine = partial(combine_lanes, may_start_early=False) if fits(len(columns), out_block) else combine_rows
            combine(stream, y, positions, rows.ids, weights.first_expert, rows.weights, bias, out_block)
            if events:
                events[block].record()
        arrivals.free.record(current)
