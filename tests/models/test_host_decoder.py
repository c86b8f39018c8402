"""Attention of the host in compiled code: against naive loops, and against the plain transformers forward."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.experts.sgemm import sgemm_address
from pipemoe.models import host_attention
from pipemoe.models.host_decoder import HostDecoder, lack_on_host
from pipemoe.models.loading import load_decoder
from tests.models.test_decoder import assert_same_as_reference, cut_sequences, loaded, packed, sequences_of
from tests.models.tiny import run_microbatches, tiny_config

SERVED = ("qwen3_moe", "mixtral")


@cache
def host(family, **changes):
    plain, experts, reference = loaded(family, **changes)
    return HostDecoder(plain), experts, reference


@pytest.mark.parametrize(
    "family, changes",
    [
        ("qwen3_moe", {}),
        ("mixtral", {}),
        ("qwen3_moe", dict(num_layers=5, decoder_sparse_step=2)),  # dense layers before, between and after
        ("qwen3_moe", dict(norm_topk_prob=False, attention_bias=True)),
        ("mixtral", dict(sliding_window=7)),
    ],
)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(case=cut_sequences())
def test_any_cutting_gives_the_logits_of_transformers(family, changes, case):
    lengths, microbatches = case
    decoder, experts, reference = host(family, **changes)
    sequences = sequences_of(lengths)
    logits = run_microbatches(decoder, experts, [packed(sequences, pieces) for pieces in microbatches])
    assert_same_as_reference(reference, sequences, logits)


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_one_sequence_over_several_blocks_of_queries(family, length):
    decoder, experts, reference = host(family)
    sequences = sequences_of([length, 3])
    microbatch = packed(sequences, [(0, 0, length), (1, 0, 3)])
    assert_same_as_reference(reference, sequences, run_microbatches(decoder, experts, [microbatch]))


def test_a_microbatch_without_tokens():
    decoder, _, _ = host("mixtral")
    state = decoder.start(decoder.new_step(), torch.empty(0, dtype=torch.long), [])
    x, ids, weights = decoder.attend(state, 0, None)
    assert x.shape == (0, 64) and ids.shape == weights.shape == (0, 2)


def naive_attention(heads, num_query, num_key, head_dim, scaling, window):
    """Of one sequence, a number at a time: [T, num_query * head_dim]."""
    queries, keys, values = np.split(
        heads.astype(np.float64).reshape(len(heads), -1, head_dim), [num_query, num_query + num_key], axis=1
    )
    out = np.zeros((len(heads), num_query, head_dim))
    for t in range(len(heads)):
        for n in range(num_query):
            of = n // (num_query // num_key)
            seen = range(max(0, t - window + 1), t + 1)
            weights = [math.exp(scaling * float(queries[t, n] @ keys[s, of])) for s in seen]
            for s, weight in zip(seen, weights):
                out[t, n] += weight / sum(weights) * values[s, of]
    return out.reshape(len(heads), -1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 7, 63, 64, 65, 100]), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    num_key=st.integers(1, 2),
    head_dim=st.sampled_from([2, 6, 16, 17]),
    window=st.sampled_from([1, 5, 64, 1 << 62]),
    num_experts=st.sampled_from([0, 1, 5]),
)
def test_attention_is_that_of_naive_loops(lengths, groups, num_key, head_dim, window, num_experts):
    generator, hidden_size, num_query = np.random.default_rng(0), 12, groups * num_key

    def random(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    width, total = (num_query + 2 * num_key) * head_dim, sum(lengths)
    heads, hidden, weight = random(total, width), random(total, hidden_size), random(hidden_size, num_query * head_dim)
    bias, norm, gate = random(hidden_size), random(hidden_size), random(num_experts, hidden_size)
    keys = heads.ctypes.data + 4 * num_query * head_dim
    values, pieces, start, wanted = keys + 4 * num_key * head_dim, [], 0, []
    for length in lengths:
        at = 4 * width * start
        pieces.append((start, start + length, 0, keys + at, values + at, width))
        wanted.append(naive_attention(heads[start : start + length], num_query, num_key, head_dim, 0.3, window))
        start += length
    want = hidden + np.concatenate(wanted) @ weight.T.astype(np.float64) + bias
    want_x = want / np.sqrt((want**2).mean(axis=1, keepdims=True) + 1e-5) * norm
    x, logits = np.empty_like(hidden), np.empty((total, num_experts), np.float32)
    room = np.empty(host_attention.QUERY_ROWS * max(lengths), np.float32)
    host_attention.attend_rows(
        hidden, heads, np.array(pieces, np.int64), num_query, num_key, np.float32(0.3), window,
        room, sgemm_address(), weight, bias, norm, np.float32(1e-5), x, gate, logits,
    )  # fmt: skip
    np.testing.assert_allclose(hidden, want, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(x, want_x, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(logits, want_x @ gate.T, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("row", [0, 3, 9])
def test_nan_reaches_all_that_see_it_and_nothing_before(row):
    heads = np.random.default_rng(0).standard_normal((10, 12)).astype(np.float32)
    heads[row, 4:8] = np.nan  # its keys
    hidden, x = np.zeros((10, 4), np.float32), np.empty((10, 4), np.float32)
    pieces = np.array([(0, 10, 0, heads.ctypes.data + 16, heads.ctypes.data + 32, 12)], np.int64)
    none, no_gate, no_logits = (np.empty(shape, np.float32) for shape in (0, (0, 4), (10, 0)))
    host_attention.attend_rows(
        hidden, heads, pieces, 1, 1, np.float32(1), 1 << 62, np.empty(100, np.float32), sgemm_address(),
        np.eye(4, dtype=np.float32), none, np.ones(4, np.float32), np.float32(1e-6), x, no_gate, no_logits,
    )  # fmt: skip
    assert np.isnan(hidden).any(axis=1).tolist() == [t >= row for t in range(10)]


def plain(family, dtype=torch.float32, **changes):
    return load_decoder(tiny_config(family, **changes), rank=0, num_ranks=1, device="cpu", dtype=dtype)[0]


def test_what_it_lacks_has_its_words(monkeypatch):
    assert "float32, not in torch.bfloat16" in lack_on_host(plain("mixtral", torch.bfloat16))
    assert "neither latents nor interleaved" in lack_on_host(plain("deepseek_v3"))
    decoder = plain("mixtral")
    assert lack_on_host(decoder) is None
    for name, value, words in (
        ("attention_form", None, "does not state what its attention is made of"),
        ("plain_rms_norm", False, "norms that are not plain RMSNorm"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(decoder, name, value)
            assert words in lack_on_host(decoder)
    monkeypatch.setattr("pipemoe.models.host_decoder.sgemm_address", lambda: 0)
    assert "no sgemm" in lack_on_host(decoder)
