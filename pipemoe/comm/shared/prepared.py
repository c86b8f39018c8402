"""What a rank does with its rows of a wave, as calls of compiled code that are prepared once and made in each layer:
writing the rows, and adding up their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numba import types

from pipemoe.addresses import Arguments, floats_at, ints_at, long_matrix, long_vector, longs_at, places
from pipemoe.comm.shared.player import play, tell_done
from pipemoe.comm.shared.waves import add_rows
from pipemoe.comm.shared.words import compiled

if TYPE_CHECKING:
    import torch

    from pipemoe.wire import WireRows


_SUMS = places(addresses=2, strides=2, num_rows=1, width=0)
_ROWS = places(segments=2, hidden=0, top_k=0, stride=0)


@compiled(lambda: types.void(types.int64))
def _add_segments(at):
    addresses, strides = long_matrix(at, _SUMS.addresses), long_matrix(at, _SUMS.strides)
    num_rows, width = long_vector(at, _SUMS.num_rows), longs_at(at)[_SUMS.width]
    for segment in range(len(num_rows)):
        add_rows(addresses[segment], strides[segment], num_rows[segment], width)


class PreparedSums:
    """add_in_order of all of a wave's segments of this rank, as a call of compiled code."""

    def __init__(self, parts: Sequence[Sequence[torch.Tensor]], width: int) -> None:
        """parts: of each segment, with adjacent columns."""
        self._addresses = np.array([[0, *(p.data_ptr() for p in of_segment)] for of_segment in parts], np.int64)
        self._strides = np.array([[width, *(p.stride(0) for p in of_segment)] for of_segment in parts], np.int64)
        num_rows = np.array([len(of_segment[0]) for of_segment in parts], np.int64)
        self._dtype = parts[0][0].dtype
        self._arguments = Arguments(
            _SUMS, addresses=self._addresses, strides=self._strides, num_rows=num_rows, width=width
        )
        self.call = self._arguments.of(_add_segments)

    def go_to(self, results: Sequence[torch.Tensor]) -> bool:
        """Let the sums go to these, one for each segment. False if they cannot: if something is not float32, or has
        gaps.
        """
        import torch

        wanted = torch.float32, (self._strides[0, 0], 1)
        if self._dtype != torch.float32 or any((r.dtype, r.stride()) != wanted for r in results):
            return False
        self._addresses[:, 0] = [r.data_ptr() for r in results]
        return True


@compiled(lambda: types.void(types.int64))
def _pack_segments(at):
    segments, hidden = long_matrix(at, _ROWS.segments), longs_at(at)[_ROWS.hidden]
    top_k, stride = longs_at(at)[_ROWS.top_k], longs_at(at)[_ROWS.stride]
    for s in range(len(segments)):
        for row in range(segments[s, 6]):
            x, to = floats_at(segments[s, 0] + 4 * hidden * row), floats_at(segments[s, 3] + stride * row)
            for h in range(hidden):
                to[h] = x[h]
            ids, ids_to = ints_at(segments[s, 1] + 4 * top_k * row), ints_at(segments[s, 4] + stride * row)
            weights, weights_to = floats_at(segments[s, 2] + 4 * top_k * row), floats_at(segments[s, 5] + stride * row)
            for k in range(top_k):
                ids_to[k] = ids[k]
                weights_to[k] = weights[k]


class PreparedRows:
    """WireRows.write of all of a wave's segments of this rank, as a call of compiled code."""

    def __init__(self, parts: Sequence[WireRows]) -> None:
        self._parts = parts
        to = [(p.hidden.data_ptr(), p.ids.data_ptr(), p.weights.data_ptr(), len(p)) for p in parts]
        self._segments = np.array([(0, 0, 0, *of_part) for of_part in to], np.int64)
        first = parts[0]
        hidden, top_k = first.hidden.shape[1], first.ids.shape[1]
        self._arguments = Arguments(_ROWS, segments=self._segments, hidden=hidden, top_k=top_k, stride=first.stride)
        self.call = self._arguments.of(_pack_segments)

    def come_from(self, rows: Sequence[Sequence[torch.Tensor]]) -> bool:
        """Let them be copies of these: of each segment hidden, ids and weights. False if they cannot."""
        for part, of_segment in zip(self._parts, rows, strict=True):
            like = part.hidden, part.ids, part.weights
            if any(a.dtype != b.dtype or not a.is_contiguous() for a, b in zip(of_segment, like, strict=True)):
                return False
        self._segments[:, :3] = [[tensor.data_ptr() for tensor in of_segment] for of_segment in rows]
        return True


def compile_for_records() -> None:
    """All that records call of this part, and what plays them."""
    for function in (play, tell_done, _add_segments, _pack_segments):
        function.compile()
