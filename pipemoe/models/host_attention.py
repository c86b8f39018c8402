"""Attention of a decoder layer on the host in two calls of compiled code, without the GIL.

    project_rows   hidden --norm--> x --q, k, v in one product, bias--> heads --norms of heads, rotary embedding-->
    attend_rows    heads --each piece's queries look at its keys--> heads --output product, added to--> hidden
                   --norm--> x --router's product--> logits

A row of heads is | queries of each head | keys | values |; attention writes its results over the queries. All float32.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import intrinsic

from pipemoe.addresses import long_matrix, longs_at, matrix, places, real, vector
from pipemoe.compiled import Compiled
from pipemoe.experts.exponential import exp
from pipemoe.experts.sgemm import multiply, multiply_by_weights, new_call

QUERY_ROWS = 64  # whose scores are computed at once: enough for the library's full rate
# The arguments of attend_layer: addresses of those of the layer and of the microbatch.
CALL = places(layer=0, state=0)
LAYER = places(
    num_query=0,
    num_key=0,
    rotary=0,
    window=0,
    sgemm=0,
    eps_in=0,
    head_eps=0,
    scaling=0,
    eps_out=0,
    norm_in=1,
    weight=2,
    bias=1,
    q_norm=1,
    k_norm=1,
    out=2,
    out_bias=1,
    norm_out=1,
    gate=2,
)
STATE = places(hidden=2, x=2, heads=2, cos=2, sin=2, pieces=2, room=1, sums=2, logits=2)
_MATRIX, _VECTOR, _WHOLE = types.float32[:, ::1], types.float32[::1], types.int64


def _compiled(*arguments):
    def decorate(function):
        return Compiled(
            function,
            signatures=lambda: [types.void(*arguments)],
            what="the attention of the host",
            nogil=True,
            error_model="numpy",
        )

    return decorate


def _part(function):
    return Compiled(function, inside=True, nogil=True, error_model="numpy")


def _in_any_order(function):
    """A part whose sums become vector instructions. It must not call `exp`, which would lose its rounding."""
    return Compiled(function, inside=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})


@_in_any_order
def _sum_of_squares(row):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return total


@_in_any_order
def _sum(row):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i]
    return total


@intrinsic
def _larger(typing_context, a, b):
    """The larger of two, either of them if one is NaN: so a loop of it becomes vector instructions."""

    def generate(context, builder, signature, arguments):
        any_order = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", *arguments, flags=any_order), *arguments, flags=any_order)

    return types.float32(types.float32, types.float32), generate


@_part
def _largest(row):
    most = row[0]
    for i in range(1, len(row)):
        most = _larger(row[i], most)
    return most


@_part
def _norm(row, weight, eps, out):
    """RMSNorm of one row."""
    scale = np.float32(1) / math.sqrt(_sum_of_squares(row) / np.float32(len(weight)) + eps)
    for h in range(len(weight)):
        out[h] = row[h] * scale * weight[h]


@_compiled(
    _MATRIX, _VECTOR, types.float32, _MATRIX, _WHOLE, _MATRIX, _VECTOR,
    _WHOLE, _WHOLE, _WHOLE, _VECTOR, _VECTOR, types.float32, _MATRIX, _MATRIX, _MATRIX,
)  # fmt: skip
def project_rows(
    hidden, norm, eps, x, sgemm, weight, bias,
    num_query, num_key, rotary, query_norm, key_norm, head_eps, cos, sin, heads,
):  # fmt: skip
    """heads [T, W] from hidden [T, H]; x [T, H] is room. weight [W, H]; bias [W] or [0]; query_norm, key_norm: [D] or
    [0]; cos, sin: [T, >= rotary / 2], of the first `rotary` values of a head, pairs half of that apart.
    """
    depth, width = weight.shape[1], weight.shape[0]
    head_dim, half = width // (num_query + 2 * num_key), rotary // 2
    for t in range(len(hidden)):
        _norm(hidden[t], norm, eps, x[t])
    rows, out = (x.ctypes.data, depth), (heads.ctypes.data, width)
    multiply_by_weights(sgemm, new_call(), rows, len(x), depth, weight.ctypes.data, width, out, False)
    for t in range(len(heads)):
        for j in range(len(bias)):
            heads[t, j] += bias[j]
        for n in range(num_query + num_key):
            head = heads[t, n * head_dim : (n + 1) * head_dim]
            of_head = query_norm if n < num_query else key_norm
            if len(of_head):
                _norm(head, of_head, head_eps, head)
            for j in range(half):
                first, second = head[j], head[half + j]
                head[j] = first * cos[t, j] - second * sin[t, j]
                head[half + j] = second * cos[t, j] + first * sin[t, j]


@_part
def _softmax(scores):
    most = _largest(scores)
    for s in range(len(scores)):
        scores[s] = exp(scores[s] - most)
    scale = np.float32(1) / _sum(scores)
    for s in range(len(scores)):
        scores[s] *= scale


@_part
def _attend(sgemm, call, heads, piece, num_query, num_key, head_dim, scaling, window, room):
    """Of one piece: its first and last row of queries, the token that the first one is, and the addresses of its keys
    and values, of all tokens so far, and how far apart these are.
    """
    first, last, position, keys, values, stride = piece
    width = heads.shape[1]
    for start in range(first, last, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, last)
        seen = position + stop - first
        oldest = max(0, position + start - first - window + 1)  # key that any of these queries sees
        scores = room[: (stop - start) * (seen - oldest)].reshape((stop - start, seen - oldest))
        for n in range(num_query):
            at = 4 * (n // (num_query // num_key) * head_dim + oldest * stride)
            query = heads.ctypes.data + 4 * (start * width + n * head_dim), width
            where = scores.ctypes.data, seen - oldest
            multiply(
                sgemm, call, query, stop - start, head_dim, (keys + at, stride), True, seen - oldest, where, scaling,
                False,
            )  # fmt: skip
            for t in range(stop - start):
                now = position + start - first + t + 1 - oldest
                _softmax(scores[t, max(0, now - window) : now])
                scores[t, : max(0, now - window)] = 0
                scores[t, now:] = 0
            multiply(
                sgemm, call, where, stop - start, seen - oldest, (values + at, stride), False, head_dim, query, 1,
                False,
            )  # fmt: skip


@_compiled(
    _MATRIX, _MATRIX, types.int64[:, ::1], _WHOLE, _WHOLE, types.float32, _WHOLE,
    _VECTOR, _WHOLE, _MATRIX, _VECTOR, _VECTOR, types.float32, _MATRIX, _MATRIX, _MATRIX,
)  # fmt: skip
def attend_rows(
    hidden, heads, pieces, num_query, num_key, scaling, window,
    room, sgemm, weight, bias, norm, eps, x, gate, logits,
):  # fmt: skip
    """Add what attention makes of heads [T, W] to hidden [T, H]. Then x [T, H] is its norm, and logits [T, E] what the
    router `gate` [E, H] makes of that (E may be 0).

    pieces [P, 6]: see _attend. window: how many tokens a query sees. room: for the scores of QUERY_ROWS queries. weight
    [H, Hq D], bias [H] or [0].
    """
    width, depth, inner = heads.shape[1], hidden.shape[1], weight.shape[1]
    head_dim, call = inner // num_query, new_call()
    for p in range(len(pieces)):
        first, last, position = pieces[p, 0], pieces[p, 1], pieces[p, 2]
        piece = first, last, position, pieces[p, 3], pieces[p, 4], pieces[p, 5]
        _attend(sgemm, call, heads, piece, num_query, num_key, head_dim, scaling, window, room)
    out = hidden.ctypes.data, depth
    multiply_by_weights(
        sgemm, call, (heads.ctypes.data, width), len(heads), inner, weight.ctypes.data, depth, out, True
    )
    for t in range(len(hidden)):
        for h in range(len(bias)):
            hidden[t, h] += bias[h]
        _norm(hidden[t], norm, eps, x[t])
    if len(gate):
        rows, out = (x.ctypes.data, depth), (logits.ctypes.data, len(gate))
        multiply_by_weights(sgemm, call, rows, len(x), depth, gate.ctypes.data, len(gate), out, False)


@_compiled(_WHOLE)
def attend_layer(at):
    """Both, behind the sum with the experts' results of the layer before. at: of its arguments, CALL; see
    HostDecoder.prepared.
    """
    of_layer, of_state = longs_at(at)[CALL.layer], longs_at(at)[CALL.state]
    layer, hidden, x = longs_at(of_layer), matrix(of_state, STATE.hidden), matrix(of_state, STATE.x)
    num_query, num_key, rotary = layer[LAYER.num_query], layer[LAYER.num_key], layer[LAYER.rotary]
    sgemm, heads, sums = layer[LAYER.sgemm], matrix(of_state, STATE.heads), matrix(of_state, STATE.sums)
    for t in range(len(hidden)):
        for h in range(hidden.shape[1]):
            hidden[t, h] += sums[t, h]
    project_rows(
        hidden, vector(of_layer, LAYER.norm_in), np.float32(real(of_layer, LAYER.eps_in)), x, sgemm,
        matrix(of_layer, LAYER.weight), vector(of_layer, LAYER.bias), num_query, num_key, rotary,
        vector(of_layer, LAYER.q_norm), vector(of_layer, LAYER.k_norm), np.float32(real(of_layer, LAYER.head_eps)),
        matrix(of_state, STATE.cos), matrix(of_state, STATE.sin), heads,
    )  # fmt: skip
    attend_rows(
        hidden, heads, long_matrix(of_state, STATE.pieces), num_query, num_key,
        np.float32(real(of_layer, LAYER.scaling)), layer[LAYER.window], vector(of_state, STATE.room), sgemm,
        matrix(of_layer, LAYER.out), vector(of_layer, LAYER.out_bias), vector(of_layer, LAYER.norm_out),
        np.float32(real(of_layer, LAYER.eps_out)), x, matrix(of_layer, LAYER.gate), matrix(of_state, STATE.logits),
    )  # fmt: skip
