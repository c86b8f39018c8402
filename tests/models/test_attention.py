"""Packed attention against one explicit softmax per query."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.models import attention
from pipemoe.models.attention import packed_attention
from pipemoe.models.packing import Packing, Piece

PIECES = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 9), st.integers(0, 3)).map(lambda t: (t[0], t[0] + t[1], sum(t))),
    min_size=1,
    max_size=4,
)


def naive(query, key, value, packing, scaling, window):
    """[T, Hq, Dv], token by token in float64."""
    query, key, value = (t[0].transpose(0, 1).double() for t in (query, key, value))  # [rows, heads, D]
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[2], dtype=torch.float64)
    for piece, span in zip(packing.pieces, packing.spans):
        for row in range(span.query_start, span.query_stop):
            last = span.key_start + piece.start + row - span.query_start
            first = span.key_start if window is None else max(span.key_start, last - window + 1)
            for head in range(query.shape[1]):
                scores = key[first : last + 1, head // group] @ query[row, head] * scaling
                out[row, head] = scores.softmax(0) @ value[first : last + 1, head // group]
    return out


@pytest.mark.parametrize("kv_heads, value_dim, window", [(4, 16, None), (2, 16, None), (4, 8, None), (2, 16, 5)])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(pieces=PIECES)
def test_against_naive(kv_heads, value_dim, window, pieces):
    pieces = [Piece(s, *piece) for s, piece in enumerate(pieces)]
    num_tokens = sum(p.stop - p.start for p in pieces)
    packing = Packing(torch.zeros(num_tokens, dtype=torch.int64), pieces, 1, torch.device("cpu"))
    generator = torch.Generator().manual_seed(num_tokens)
    query = torch.randn(1, num_tokens, 4, 16, generator=generator).transpose(1, 2)
    key = torch.randn(1, kv_heads, packing.num_keys, 16, generator=generator)
    value = torch.randn(1, kv_heads, packing.num_keys, value_dim, generator=generator)
    out, _ = packed_attention(None, query, key, value, None, packing=packing, scaling=0.3, sliding_window=window)
    assert out.shape == (1, num_tokens, 4, value_dim)
    want = naive(query, key, value, packing, 0.3, window)
    torch.testing.assert_close(out[0].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads, value_dim, window", [(4, 16, None), (2, 16, None), (4, 8, None), (2, 16, 5)])
def test_the_flash_path_hands_over_the_same_problem(kv_heads, value_dim, window, monkeypatch):
    """The CUDA kernel replaced by its contract: variable lengths, causal with the diagonal at the last key."""
    pieces = [Piece(0, 0, 4, 4), Piece(7, 3, 9, 10), Piece(2, 1, 2, 2)]
    packing = Packing(torch.zeros(11, dtype=torch.int64), pieces, 1, torch.device("cpu"))
    query, key = torch.randn(1, 4, 11, 16), torch.randn(1, kv_heads, packing.num_keys, 16)
    value = torch.randn(1, kv_heads, packing.num_keys, value_dim)

    def kernel(q, k, v, q_offsets, k_offsets, max_q, max_k, dropout, is_causal, debug, *, scale, **window_sizes):
        assert (dropout, is_causal, debug) == (0.0, True, False)
        assert q.shape[2] == k.shape[2] == v.shape[2] and q.stride(2) == k.stride(2) == v.stride(2) == 1
        assert (max_q, max_k) == (int(q_offsets.diff().max()), int(k_offsets.diff().max()))
        left, right = window_sizes["window_size_left"], window_sizes["window_size_right"]
        out = torch.zeros(*q.shape[:2], v.shape[2])
        for i in range(len(q_offsets) - 1):
            qs, ks = slice(*q_offsets[i : i + 2].tolist()), slice(*k_offsets[i : i + 2].tolist())
            rows, keys = qs.stop - qs.start, ks.stop - ks.start
            mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
            if left is not None:
                assert right == 0
                mask = mask.triu(keys - rows - left)
            repeat = q.shape[1] // k.shape[1]
            scores = torch.einsum("qhd,khd->hqk", q[qs], k[ks].repeat_interleave(repeat, 1)) * scale
            probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
            out[qs] = torch.einsum("hqk,khd->qhd", probabilities, v[ks].repeat_interleave(repeat, 1))
        return (out,)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", kernel)
    arguments = dict(packing=packing, scaling=0.3, sliding_window=window)
    by_piece, _ = packed_attention(None, query, key, value, None, **arguments)
    monkeypatch.setattr(attention, "serves", lambda *_: True)
    by_flash, _ = packed_attention(None, query, key, value, None, **arguments)
    torch.testing.assert_close(by_flash, by_piece)
