"""The (token, k) pairs of a wave that meet a local expert, on the host: index, gather, activation, weighted combine.

    ids [n, K]          positions [n, K]      sorted order (rows of x, h, y)
      7  2                2  0                  0: token 0 (expert 2)  |
     -1  2        ->     -1  1                  1: token 1 (expert 2)  | offsets[0] .. offsets[1]
      9  7               -1  3                  2: token 0 (expert 7)  | offsets[5] .. offsets[6]
                                                3: token 2 (expert 7)  |
    (local experts 2..7)  -1: no local expert   within an expert: ascending token, then ascending k

Numba functions that release the GIL, so that several worker threads run at once. Every loop runs along one row at a
time, so a row's bits cannot depend on its neighbours. They are compiled while warming up, or at the first call, and
only for the layouts written out here, so that no later call compiles. The vocabulary follows scattermoe (sorted order,
expert offsets).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pipemoe.compiled import Compiled

# Adding and subtracting 1.5 * 2^52 * 2^-32 rounds a float64 of magnitude under 2^19 to the nearest multiple of 2^-32.
# Larger values are rounded to coarser multiples, which lie on the same grid.
GRID_ROUNDING = 1.5 * 2.0**20


def compiled(signatures: Callable[[Any], list]) -> Callable[[Callable], Compiled]:
    """Compile for `signatures`, which it makes of numba.types."""

    def decorate(function: Callable) -> Compiled:
        return Compiled(
            function,
            signatures=lambda: signatures(_numba_types()),
            what="the experts of the host",
            nogil=True,
            error_model="numpy",
        )

    return decorate


def _numba_types() -> Any:
    from numba import types

    return types


@compiled(lambda t: [t.void(t.int32[:, :], t.int64, t.int64[::1], t.int32[:, ::1], t.int32[::1])])
def index_pairs(ids, first_expert, offsets, positions, sorted_tokens):
    """Stable counting sort of the local pairs by expert.

    ids [n, K] int32 global expert ids -> offsets [E_loc + 1] int64, positions [>= n, K] int32 (-1: not local),
    sorted_tokens [>= number of local pairs] int32.
    """
    num_local = offsets.shape[0] - 1
    offsets[:] = 0
    for token in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            expert = ids[token, k] - first_expert
            if 0 <= expert < num_local:
                offsets[expert + 1] += 1
    for expert in range(num_local):
        offsets[expert + 1] += offsets[expert]
    # offsets[e] is the cursor of expert e and ends as the start of e + 1: shift back afterwards.
    for token in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            expert = ids[token, k] - first_expert
            if 0 <= expert < num_local:
                position = offsets[expert]
                offsets[expert] = position + 1
                positions[token, k] = position
                sorted_tokens[position] = token
            else:
                positions[token, k] = -1
    for expert in range(num_local, 0, -1):
        offsets[expert] = offsets[expert - 1]
    offsets[0] = 0


@compiled(
    lambda t: [
        t.void(t.float32[:, ::1], t.int32[::1], t.int64, t.int64, t.float32[:, ::1]),
        t.void(t.int16[:, ::1], t.int32[::1], t.int64, t.int64, t.int16[:, ::1]),
    ]
)
def gather_rows(rows, sorted_tokens, start, stop, out):
    """out[i] = rows[sorted_tokens[start + i], :H] for start + i < stop, zeros in the rest of out [tile, H].

    rows [n, >= H]: whole wire rows in the format of their hidden values, which come first.
    """
    for i in range(out.shape[0]):
        if start + i < stop:
            token = sorted_tokens[start + i]
            for h in range(out.shape[1]):
                out[i, h] = rows[token, h]
        else:
            for h in range(out.shape[1]):
                out[i, h] = 0


@compiled(
    lambda t: [t.void(t.float32[:, ::1], t.float32[::1], t.int64, t.float64, t.float64, t.float64, t.float32[:, ::1])]
)
def activate_rows(h, bias, activation, limit, alpha, up_offset, out):
    """out[i, j] = activation(h[i, j] + bias[j]) * (h[i, I + j] + bias[I + j] + up_offset); float32, bias [2I] or [0].

    activation: its index in gating.ACTIVATIONS; limit (infinity: none), alpha: as in Gating. If h is [tile, I] there is
    no second factor, and bias is [I] or [0].
    """
    intermediate = out.shape[1]
    zero, half, one, root_of_half = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(0.5**0.5)
    linear, cubic = np.float32(2 * (2 / math.pi) ** 0.5), np.float32(0.044715)
    most, sharpness, offset = np.float32(limit), np.float32(alpha), np.float32(up_offset)
    for i in range(out.shape[0]):
        for j in range(intermediate):
            gate = h[i, j]
            if bias.shape[0] > 0:
                gate += bias[j]
            gate = most if gate > most else gate
            if activation == 0:
                value = gate / (one + math.exp(-sharpness * gate))
            elif activation == 1:
                value = half * gate * (one + math.erf(root_of_half * gate))
            elif activation == 2:
                value = zero if gate < zero else gate
            elif activation == 3:
                value = gate / (one + math.exp(-linear * (gate + cubic * gate * gate * gate)))
            else:
                value = zero if gate < zero else gate * gate
            if h.shape[1] > intermediate:
                up = h[i, intermediate + j]
                if bias.shape[0] > 0:
                    up += bias[intermediate + j]
                up = most if up > most else up
                up = -most if up < -most else up
                value *= up + offset
            out[i, j] = value


@compiled(lambda t: [t.void(t.float32[:, ::1], t.int32[:, ::1], t.float32[:, :], t.int64, t.float32[:, ::1])])
def combine_rows(y, positions, weights, start, out):
    """out[i] = sum over ascending k of weights[start + i, k] * y[positions[start + i, k]]; float32, every row."""
    for i in range(out.shape[0]):
        for h in range(out.shape[1]):
            out[i, h] = 0
        for k in range(weights.shape[1]):
            position = positions[start + i, k]
            if position >= 0:
                weight = weights[start + i, k]
                for h in range(out.shape[1]):
                    out[i, h] += weight * y[position, h]


@compiled(lambda t: [t.void(t.float32[:, ::1], t.int32[:, ::1], t.float32[:, :], t.int64, t.float64[:, ::1])])
def combine_rows_on_grid(y, positions, weights, start, out):
    """combine_rows into float64: each float32 product is rounded to a multiple of 2^-32, so sums are exact."""
    for i in range(out.shape[0]):
        for h in range(out.shape[1]):
            out[i, h] = 0
        for k in range(weights.shape[1]):
            position = positions[start + i, k]
            if position >= 0:
                weight = weights[start + i, k]
                for h in range(out.shape[1]):
                    contribution = np.float64(np.float32(weight * y[position, h]))
                    out[i, h] += (contribution + GRID_ROUNDING) - GRID_ROUNDING


def compile_all(deterministic: bool) -> None:
    """Compile all functions that the experts call."""
    for function in (index_pairs, gather_rows, activate_rows, combine_rows_on_grid if deterministic else combine_rows):
        function.compile()
