"""The (token, k) pairs of a wave that meet a local expert, on the host: index, gather, activation, weighted combine.

    ids [n, K]          positions [n, K]      sorted order (sources; rows of x, h, y)
      7  2                2  0                  0: token 0 (expert 2)  |
     -1  2        ->     -1  1                  1: token 1 (expert 2)  | offsets[0] .. offsets[1]
      9  7               -1  3                  2: token 0 (expert 7)  | offsets[5] .. offsets[6]
                                                3: token 2 (expert 7)  |
    (local experts 2..7)  -1: no local expert   within an expert: ascending token, then ascending k

The rows of a wave may lie in pieces, one for each segment, in the memory of the ranks that own them.

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

from pipemoe.addresses import (
    double_matrix,
    floats_at,
    int_matrix,
    ints_at,
    long_matrix,
    long_vector,
    longs_at,
    matrix,
    places,
    real,
    shorts_at,
    vector,
)
from pipemoe.compiled import Compiled
from pipemoe.experts.exponential import exp
from pipemoe.experts.sgemm import multiply_by_weights, new_call

# Adding and subtracting 1.5 * 2^52 * 2^-32 rounds a float64 of magnitude under 2^19 to the nearest multiple of 2^-32.
# Larger values are rounded to coarser multiples, which lie on the same grid.
GRID_ROUNDING = 1.5 * 2.0**20

# The arguments of call_experts: addresses of those of the layer, of the wave and of the scratch.
CALL = places(layer=0, wave=0, scratch=0)
LAYER = places(
    gate_up=1,
    down=1,
    gate_up_bias=2,
    down_bias=2,
    sgemm=0,
    first_expert=0,
    tile_rows=0,
    whole_tiles=0,
    width=0,  # of gate_up's products
    intermediate=0,
    activation=0,
    limit=0,
    alpha=0,
    up_offset=0,
)
WAVE = places(pieces=2, stride=0, ranges=2, out=2)
SCRATCH = places(offsets=1, sources=1, positions=2, rows=2, x_tile=2, h_tile=1, a_tile=1, y_tile=2, y=2)


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


def part(function: Callable) -> Compiled:
    """For functions that compiled code calls."""
    return Compiled(function, inside=True, nogil=True, error_model="numpy")


def _numba_types() -> Any:
    from numba import types

    return types


@compiled(
    lambda t: [t.void(t.int64[:, ::1], t.int64, t.int64, t.int64[::1], t.int32[:, ::1], t.int64[::1], t.int64[:, ::1])]
)
def index_pairs(pieces, stride, first_expert, offsets, positions, sources, rows):
    """Stable counting sort of the local pairs by expert.

    pieces [P, 5]: addresses of a piece's hidden values, ids (global) and weights, its number of rows, and the first of
    them in the wave, which ascends. stride: bytes from row to row. Writes offsets [E_loc + 1]; positions [>= n, K] (-1:
    not local); sources [>= number of local pairs], the address of each sorted pair's hidden values; and rows [n, 2], of
    each row of the wave the addresses of its hidden values and weights. Rows in no piece keep what they had.
    """
    num_local, top_k = offsets.shape[0] - 1, positions.shape[1]
    offsets[:] = 0
    for p in range(pieces.shape[0]):
        for i in range(pieces[p, 3]):
            ids, row = ints_at(pieces[p, 1] + i * stride), pieces[p, 4] + i
            rows[row, 0] = pieces[p, 0] + i * stride
            rows[row, 1] = pieces[p, 2] + i * stride
            for k in range(top_k):
                expert = ids[k] - first_expert
                if 0 <= expert < num_local:
                    offsets[expert + 1] += 1
                    positions[row, k] = expert  # ids are read once: whoever owns them may be at fault
                else:
                    positions[row, k] = -1
    for expert in range(num_local):
        offsets[expert + 1] += offsets[expert]
    # offsets[e] is the cursor of expert e and ends as the start of e + 1: shift back afterwards.
    for p in range(pieces.shape[0]):
        for row in range(pieces[p, 4], pieces[p, 4] + pieces[p, 3]):
            for k in range(top_k):
                expert = positions[row, k]
                if expert >= 0:
                    position = offsets[expert]
                    offsets[expert] = position + 1
                    positions[row, k] = position
                    sources[position] = rows[row, 0]
    for expert in range(num_local, 0, -1):
        offsets[expert] = offsets[expert - 1]
    offsets[0] = 0


@compiled(lambda t: [t.void(t.int64[::1], t.int64, t.int64, t.float32[:, ::1])])
def gather_rows(sources, start, stop, out):
    """out[i] = the values at sources[start + i] for start + i < stop, zeros in the rest of out [tile, H]."""
    for i in range(out.shape[0]):
        if start + i < stop:
            row = floats_at(sources[start + i])
            for h in range(out.shape[1]):
                out[i, h] = row[h]
        else:
            for h in range(out.shape[1]):
                out[i, h] = 0


@compiled(lambda t: [t.void(t.int64[::1], t.int64, t.int64, t.int16[:, ::1])])
def gather_narrow_rows(sources, start, stop, out):
    """gather_rows of 16-bit floats. Numba knows none, but a gather only moves bits."""
    for i in range(out.shape[0]):
        if start + i < stop:
            row = shorts_at(sources[start + i])
            for h in range(out.shape[1]):
                out[i, h] = row[h]
        else:
            for h in range(out.shape[1]):
                out[i, h] = 0


@part
def _silu_rows(h, bias, out):
    """activate_rows of plain silu, the form of nearly all models: alone in its loop it takes a third less time."""
    intermediate, one = out.shape[1], np.float32(1.0)
    for i in range(out.shape[0]):
        for j in range(intermediate):
            gate = h[i, j]
            if bias.shape[0] > 0:
                gate += bias[j]
            value = gate / (one + exp(-gate))
            if h.shape[1] > intermediate:
                up = h[i, intermediate + j]
                if bias.shape[0] > 0:
                    up += bias[intermediate + j]
                value *= up
            out[i, j] = value


@compiled(
    lambda t: [t.void(t.float32[:, ::1], t.float32[::1], t.int64, t.float64, t.float64, t.float64, t.float32[:, ::1])]
)
def activate_rows(h, bias, activation, limit, alpha, up_offset, out):
    """out[i, j] = activation(h[i, j] + bias[j]) * (h[i, I + j] + bias[I + j] + up_offset); float32, bias [2I] or [0].

    activation: its index in gating.ACTIVATIONS; limit (infinity: none), alpha: as in Gating. If h is [tile, I] there is
    no second factor, and bias is [I] or [0].
    """
    if activation == 0 and limit == np.inf and alpha == 1 and up_offset == 0:
        _silu_rows(h, bias, out)
        return
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
                value = gate / (one + exp(-sharpness * gate))
            elif activation == 1:
                value = half * gate * (one + math.erf(root_of_half * gate))
            elif activation == 2:
                value = zero if gate < zero else gate
            elif activation == 3:
                value = gate / (one + exp(-linear * (gate + cubic * gate * gate * gate)))
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


@part
def _copy_rows(rows, to):
    """to = the first of rows. As an assignment to a slice, numba would compile an error message for three seconds."""
    for i in range(to.shape[0]):
        for h in range(to.shape[1]):
            to[i, h] = rows[i, h]


@compiled(
    lambda t: [
        t.void(
            *(t.int64, t.int64[::1], t.int64[::1], t.float32[:, ::1], t.float32[:, ::1], t.int64[::1], t.int64[::1]),
            *(t.int64, t.boolean, t.int64, t.float64, t.float64, t.float64, t.float32[:, ::1], t.float32[::1]),
            *(t.float32[::1], t.float32[:, ::1], t.float32[:, ::1]),
        )
    ]
)
def compute_experts(
    sgemm, gate_up, down, gate_up_bias, down_bias, offsets, sources,
    tile_rows, whole_tiles, activation, limit, alpha, up_offset, x_tile, h_tile,
    a_tile, y_tile, y,
):  # fmt: skip
    """All experts of a layer on the sorted pairs: y [pairs, H], before weights.

    sgemm: its address. gate_up, down [E_loc]: addresses of [2I or I, H] and [H, I]. Biases [E_loc, 2I or I] and
    [E_loc, H], or [E_loc, 0]. whole_tiles: every GEMM has tile_rows rows. The other arguments: see activate_rows, and
    HostScratch.
    """
    num_experts, hidden = len(gate_up), y.shape[1]
    intermediate = len(a_tile) // max(1, x_tile.shape[0])
    width = len(h_tile) // max(1, x_tile.shape[0])
    call = new_call()
    for expert in range(num_experts):
        for start in range(offsets[expert], offsets[expert + 1], tile_rows):
            num_pairs = min(tile_rows, offsets[expert + 1] - start)
            num_rows = tile_rows if whole_tiles else num_pairs
            gather_rows(sources, start, start + num_pairs, x_tile[:num_rows])
            h = h_tile[: num_rows * width].reshape(num_rows, width)
            a = a_tile[: num_rows * intermediate].reshape(num_rows, intermediate)
            x, to = (x_tile.ctypes.data, hidden), (h.ctypes.data, width)
            multiply_by_weights(sgemm, call, x, num_rows, hidden, gate_up[expert], width, to, False)
            activate_rows(h, gate_up_bias[expert], activation, limit, alpha, up_offset, a)
            out = y_tile if whole_tiles else y[start : start + num_pairs]
            x, to = (a.ctypes.data, intermediate), (out.ctypes.data, hidden)
            multiply_by_weights(sgemm, call, x, num_rows, intermediate, down[expert], hidden, to, False)
            if whole_tiles:
                _copy_rows(y_tile, y[start : start + num_pairs])
            for i in range(start, start + num_pairs):
                for h_at in range(down_bias.shape[1]):
                    y[i, h_at] += down_bias[expert, h_at]


@compiled(
    lambda t: [t.void(t.float32[:, ::1], t.int32[:, ::1], t.int64[:, ::1], t.int64[:, ::1], t.int64, t.float32[:, ::1])]
)
def combine_rows(y, positions, rows, ranges, first, out):
    """out[row - first] = the sum over k of weights[row, k] * y[positions[row, k]], for rows in `ranges` [., 2];
    float32.

    rows: see index_pairs; they say where the weights are.
    """
    for p in range(ranges.shape[0]):
        for row in range(ranges[p, 0], ranges[p, 1]):
            to, weights = out[row - first], floats_at(rows[row, 1])
            for h in range(len(to)):
                to[h] = 0
            for k in range(positions.shape[1]):
                position = positions[row, k]
                if position >= 0:
                    weight, values = weights[k], y[position]
                    for h in range(len(to)):
                        to[h] += weight * values[h]


@compiled(
    lambda t: [t.void(t.float32[:, ::1], t.int32[:, ::1], t.int64[:, ::1], t.int64[:, ::1], t.int64, t.float64[:, ::1])]
)
def combine_rows_on_grid(y, positions, rows, ranges, first, out):
    """combine_rows into float64: each float32 product is rounded to a multiple of 2^-32, so sums are exact."""
    for p in range(ranges.shape[0]):
        for row in range(ranges[p, 0], ranges[p, 1]):
            to, weights = out[row - first], floats_at(rows[row, 1])
            for h in range(len(to)):
                to[h] = 0
            for k in range(positions.shape[1]):
                position = positions[row, k]
                if position >= 0:
                    weight, values = weights[k], y[position]
                    for h in range(len(to)):
                        contribution = np.float64(np.float32(weight * values[h]))
                        to[h] += (contribution + GRID_ROUNDING) - GRID_ROUNDING


@compiled(lambda t: [t.void(t.int64)])
def call_experts(at):
    """A whole call of the experts. at: of its arguments, CALL; see HostExperts.prepared."""
    of_layer, of_wave, of_scratch = longs_at(at)[CALL.layer], longs_at(at)[CALL.wave], longs_at(at)[CALL.scratch]
    layer, whole_tiles = longs_at(of_layer), longs_at(of_layer)[LAYER.whole_tiles] != 0
    gate_up, down = long_vector(of_layer, LAYER.gate_up), long_vector(of_layer, LAYER.down)
    offsets = long_vector(of_scratch, SCRATCH.offsets)[: len(gate_up) + 1]
    sources, positions = long_vector(of_scratch, SCRATCH.sources), int_matrix(of_scratch, SCRATCH.positions)
    rows, ranges = long_matrix(of_scratch, SCRATCH.rows), long_matrix(of_wave, WAVE.ranges)
    x_tile, y_tile = matrix(of_scratch, SCRATCH.x_tile), matrix(of_scratch, SCRATCH.y_tile)
    h_tile = vector(of_scratch, SCRATCH.h_tile)[: len(x_tile) * layer[LAYER.width]]
    a_tile = vector(of_scratch, SCRATCH.a_tile)[: len(x_tile) * layer[LAYER.intermediate]]
    y = matrix(of_scratch, SCRATCH.y)
    index_pairs(
        long_matrix(of_wave, WAVE.pieces), longs_at(of_wave)[WAVE.stride], layer[LAYER.first_expert], offsets,
        positions, sources, rows,
    )  # fmt: skip
    compute_experts(
        layer[LAYER.sgemm], gate_up, down, matrix(of_layer, LAYER.gate_up_bias), matrix(of_layer, LAYER.down_bias),
        offsets, sources, layer[LAYER.tile_rows], whole_tiles, layer[LAYER.activation], real(of_layer, LAYER.limit),
        real(of_layer, LAYER.alpha), real(of_layer, LAYER.up_offset), x_tile, h_tile, a_tile, y_tile, y,
    )  # fmt: skip
    if whole_tiles:
        combine_rows_on_grid(y, positions, rows, ranges, 0, double_matrix(of_wave, WAVE.out))
    else:
        combine_rows(y, positions, rows, ranges, 0, matrix(of_wave, WAVE.out))


def compile_all(deterministic: bool) -> None:
    """Compile all functions that the experts call."""
    combine = combine_rows_on_grid if deterministic else combine_rows
    for function in (
        index_pairs,
        gather_rows,
        gather_narrow_rows,
        activate_rows,
        compute_experts,
        combine,
        call_experts,
    ):
        function.compile()
