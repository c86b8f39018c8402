"""One layer's experts call with one scratch, for rows and an out of one layout, with all launches packed beforehand.

    launches    index        gate_up   down   combine
    rewritten   ids, pairs   hidden    -      ids, weights, out

A call then only writes a few addresses and numbers into place, and calls the driver. As its scratch, it serves one call
at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from pipemoe_kernels.combine import combine_rows
from pipemoe_kernels.combine_lanes import PackedCombine, fits
from pipemoe_kernels.index.hopper import PackedIndex
from pipemoe_kernels.launch.kernel import Stream, current_stream

if TYPE_CHECKING:
    from pipemoe.experts.weights import ExpertWeights
    from pipemoe.wire import WireRows

PackedGateUp = Callable[[int, int, int], None]  # stream, address of the hidden values, pairs
PackedDown = Callable[[int, int], None]  # stream, pairs


class PreparedCall:
    """Enqueues on torch's current stream. rows, out: of the call that this is made for; later calls have their layout.
    y [pairs, H]: what `down` computes.
    """

    def __init__(
        self,
        weights: ExpertWeights,
        index: PackedIndex,
        gate_up: PackedGateUp,
        down: PackedDown,
        y: torch.Tensor,
        positions: torch.Tensor,
        rows: WireRows,
        out: torch.Tensor,
        *,
        on_hopper: bool,
        may_start_early: bool,
    ):
        self._device_index = rows.hidden.get_device()
        self._index, self._gate_up, self._down, self._y = index, gate_up, down, y
        self._first_expert, self._positions, self._top_k = weights.first_expert, positions, positions.shape[1]
        self._bias, self._combine = weights.down_bias, None
        if fits(out.shape[1], out):
            self._combine = PackedCombine(
                self._device_index,
                y,
                positions,
                rows.ids,
                weights.first_expert,
                rows.weights,
                weights.down_bias,
                out,
                on_hopper=on_hopper,
                may_start_early=may_start_early,
            )

    def __call__(self, rows: WireRows, out: torch.Tensor, num_rows: int) -> None:
        """num_rows: of rows and of out, at least 1."""
        stream = current_stream(self._device_index)
        num_pairs = num_rows * self._top_k
        ids = rows.ids.data_ptr()
        self._index(stream, ids, num_rows)
        self._gate_up(stream, rows.hidden.data_ptr(), num_pairs)
        self._down(stream, num_pairs)
        if self._combine:
            self._combine(stream, ids, rows.weights.data_ptr(), out.data_ptr(), num_rows)
        else:  # rows of out that are not on 16-byte boundaries
            y, positions = self._y[:num_pairs], self._positions[:num_rows]
            device_stream = Stream(self._device_index, stream)
            combine_rows(device_stream, y, positions, rows.ids, self._first_expert, rows.weights, self._bias, out)
