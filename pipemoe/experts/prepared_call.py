"""One layer's experts call with one scratch, for rows and an out of one layout, with all launches packed beforehand.

    launches    index        gate_up      for each block of columns:  down   combine
    rewritten   ids, pairs   hidden                                   -      ids, weights, out

A call then only writes a few addresses and numbers into place, and calls the driver. As its scratch, it serves one call
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pipemoe_kernels.combine import combine_rows
from pipemoe_kernels.combine_lanes import PackedCombine, fits
from pipemoe_kernels.index.hopper import PackedIndex
from pipemoe_kernels.launch.kernel import Stream, current_stream

if TYPE_CHECKING:
    from pipemoe.experts.protocol import Recordable
    from pipemoe.experts.weights import ExpertWeights
    from pipemoe.wire import WireRows

PackedGateUp = Callable[[int, int, int], None]  # stream, address of the hidden values, pairs
PackedDown = Callable[[int, int], None]  # stream, pairs


@dataclass(frozen=True, slots=True)
class ColumnBlock:
    """A block of out's columns; y [pairs, block]. down: None if an earlier block's launch has computed this one too."""

    columns: range
    down: PackedDown | None
    y: torch.Tensor
    bias: torch.Tensor | None


class PreparedCall:
    """Enqueues on torch's current stream. rows, parts: of the call that this is made for; later calls have their
    layout.

    parts: a matrix for each block of out's columns.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        index: PackedIndex,
        gate_up: PackedGateUp,
        blocks: Sequence[ColumnBlock],
        positions: torch.Tensor,
        rows: WireRows,
        parts: Sequence[torch.Tensor],
        *,
        on_hopper: bool,
        may_start_early: bool,
    ):
        self._device_index = rows.hidden.get_device()
        self._index, self._gate_up = index, gate_up
        self._first_expert, self._positions, self._top_k = weights.first_expert, positions, positions.shape[1]
        self._blocks = []
        for block, part in zip(blocks, parts, strict=True):
            combine = None
            if fits(len(block.columns), part):
                combine = PackedCombine(
                    self._device_index,
                    block.y,
                    positions,
                    rows.ids,
                    weights.first_expert,
                    rows.weights,
                    block.bias,
                    part,
                    on_hopper=on_hopper,
                    may_start_early=may_start_early,
                )
            self._blocks.append((block, block.down, combine, block.columns.start * part.element_size()))

    def __call__(
        self, rows: WireRows, out: torch.Tensor | Sequence[torch.Tensor], num_rows: int, events: Sequence[Recordable]
    ) -> None:
        """num_rows: of rows and of out, at least 1. events: one for each block, or none. out: one matrix, or the
        blocks.
        """
        stream = current_stream(self._device_index)
        num_pairs = num_rows * self._top_k
        ids, weights = rows.ids.data_ptr(), rows.weights.data_ptr()
        whole = out.data_ptr() if isinstance(out, torch.Tensor) else None
        self._index(stream, ids, num_rows)
        self._gate_up(stream, rows.hidden.data_ptr(), num_pairs)
        for i, (block, down, combine, offset) in enumerate(self._blocks):
            if down:
                down(stream, num_pairs)
            if combine:
                combine(stream, ids, weights, out[i].data_ptr() if whole is None else whole + offset, num_rows)
            else:
                in_block = slice(block.columns.start, block.columns.stop)
                part = out[:, in_block] if isinstance(out, torch.Tensor) else out[i]
                self._combine_any(Stream(self._device_index, stream), block, rows, part, num_rows)
            if events:
                events[i].record()

    def _combine_any(
        self, stream: Stream, block: ColumnBlock, rows: WireRows, part: torch.Tensor, num_rows: int
    ) -> None:
        """For rows of out that are not on 16-byte boundaries."""
        y, positions = block.y[: num_rows * self._top_k], self._positions[:num_rows]
        combine_rows(stream, y, positions, rows.ids, self._first_expert, rows.weights, block.bias, part)
