"""Decoder against the plain transformers forward, the routed experts done by the naive oracle of tiny.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import InputError
from pipemoe.models.decoder import Piece
from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import reference_model
from tests.models.tiny import FAMILIES, VOCAB, naive_experts, run_microbatches, tiny_config


@cache
def loaded(family, dtype=torch.float32, num_ranks=1, seed=0, **changes):
    """Decoder of rank 0, the ranks' expert weights, and the reference model."""
    config = tiny_config(family, **changes)
    parts = [
        load_decoder(config, rank=r, num_ranks=num_ranks, device="cpu", dtype=dtype, seed=seed)
        for r in range(num_ranks)
    ]
    return parts[0][0], [weights for _, weights in parts], reference_model(config, "cpu", dtype, seed)


def sequences_of(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]


def reference_logits(reference, tokens):
    with torch.no_grad():
        return reference(tokens[None]).logits[0, -1].float()


def packed(sequences, pieces):
    """One microbatch (token ids, pieces) from (sequence, start, stop) triples."""
    ids = torch.cat([sequences[s][a:b] for s, a, b in pieces])
    return ids, [Piece(s, a, b, len(sequences[s])) for s, a, b in pieces]


def assert_same_as_reference(reference, sequences, logits):
    assert sorted(logits) == list(range(len(sequences)))
    for s, tokens in enumerate(sequences):
        want = reference_logits(reference, tokens)
        torch.testing.assert_close(logits[s], want, rtol=1e-4, atol=2e-5)
        assert logits[s].argmax() == want.argmax()


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_cut_sequences_in_float32(family, num_ranks):
    decoder, experts, reference = loaded(family, num_ranks=num_ranks)
    sequences = sequences_of([5, 40, 1, 12])
    microbatches = [
        packed(sequences, [(0, 0, 5), (1, 0, 17)]),
        packed(sequences, [(1, 17, 30), (2, 0, 1)]),
        packed(sequences, [(1, 30, 31)]),
        packed(sequences, [(3, 0, 12), (1, 31, 40)]),
    ]
    assert_same_as_reference(reference, sequences, run_microbatches(decoder, experts, microbatches))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_within_norm_ratio_and_same_tokens_where_decided(family, seed):
    decoder, experts, reference = loaded(
        family, torch.bfloat16, seed=seed, num_layers=5 if family == "deepseek_v3" else 4
    )
    sequences = sequences_of([7, 23, 2], seed)
    microbatches = [packed(sequences, [(0, 0, 7), (1, 0, 11)]), packed(sequences, [(1, 11, 23), (2, 0, 2)])]
    logits = run_microbatches(decoder, experts, microbatches)
    for s, tokens in enumerate(sequences):
        want = reference_logits(reference, tokens)
        assert (logits[s] - want).norm() <= 2e-2 * want.norm()
        top = want.topk(2).values
        if top[0] - top[1] > 2 * (logits[s] - want).abs().max():
            assert logits[s].argmax() == want.argmax()


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_parity_would_see_a_wrong_expert(family):
    decoder, experts, reference = loaded(family)
    tokens = sequences_of([9])[0]

    def with_ids_shifted(x, ids, weights, layer_weights):
        return naive_experts(x, (ids + 1) % decoder.shape.num_experts, weights, layer_weights)

    state = decoder.start(decoder.new_step(), tokens, [Piece(0, 0, 9, 9)])
    y = None
    for layer in range(decoder.shape.num_layers):
        y = with_ids_shifted(*decoder.attend(state, layer, y), [experts[0][layer]])
    want = reference_logits(reference, tokens)
    assert (decoder.finish(state, y)[0] - want).abs().max() > 1e-2


@st.composite
def cut_sequences(draw):
    """Lengths, and microbatches of (sequence, start, stop) with the pieces of each sequence in order."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    pieces = []
    for s, length in enumerate(lengths):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=3)) | {0, length})
        pieces.append([(s, a, b) for a, b in zip(cuts, cuts[1:])])
    microbatches = []
    while any(pieces):
        waiting = [s for s, rest in enumerate(pieces) if rest]
        chosen = draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        microbatches.append([pieces[s].pop(0) for s in chosen])
    return lengths, microbatches


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=cut_sequences())
def test_any_cutting_gives_the_same_logits(family, case):
    lengths, microbatches = case
    decoder, experts, reference = loaded(family)
    sequences = sequences_of(lengths)
    logits = run_microbatches(decoder, experts, [packed(sequences, pieces) for pieces in microbatches])
    assert_same_as_reference(reference, sequences, logits)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("qwen3_moe", dict(num_layers=5, decoder_sparse_step=2)),  # dense before, between and after
        ("qwen3_moe", dict(num_layers=4, mlp_only_layers=(0, 3))),
        ("qwen3_moe", dict(norm_topk_prob=False, attention_bias=True)),
        ("qwen3_moe", dict(tie_word_embeddings=True)),
        ("mixtral", dict(sliding_window=7)),
        ("mixtral", dict(num_experts=7)),  # uneven over 3 ranks
        ("mixtral", dict(num_experts=2)),  # a rank without experts
        ("deepseek_v3", dict(num_experts=6)),
        ("deepseek_v3", dict(q_lora_rank=None, rope_interleave=False)),
        ("deepseek_v3", dict(num_layers=4, first_k_dense_replace=3)),
    ],
)
def test_variants_of_a_family(family, changes):
    changes = {k: list(v) if isinstance(v, tuple) else v for k, v in changes.items()}
    config = tiny_config(family, **changes)
    parts = [load_decoder(config, rank=r, num_ranks=3, device="cpu", dtype=torch.float32) for r in range(3)]
    sequences = sequences_of([20, 11])
    microbatches = [packed(sequences, [(0, 0, 13), (1, 0, 11)]), packed(sequences, [(0, 13, 20)])]
    logits = run_microbatches(parts[0][0], [weights for _, weights in parts], microbatches)
    assert_same_as_reference(reference_model(config, "cpu", torch.float32), sequences, logits)


def test_yarn_rope_of_deepseek():
    rope = dict(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1,
        mscale=1.0, mscale_all_dim=1.0, rope_theta=10000.0,
    )  # fmt: skip
    config = tiny_config("deepseek_v3", rope_parameters=rope)
    decoder, weights = load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.float32)
    sequences = sequences_of([100])
    logits = run_microbatches(decoder, [weights], [packed(sequences, [(0, 0, 60)]), packed(sequences, [(0, 60, 100)])])
    assert_same_as_reference(reference_model(config, "cpu", torch.float32), sequences, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_attend_and_finish_return(family):
    decoder, experts, _ = loaded(family)
    shape = decoder.shape
    state = decoder.start(decoder.new_step(), torch.arange(6), [Piece(0, 0, 4, 9), Piece(1, 0, 2, 2)])
    x, ids, weights = decoder.attend(state, 0, None)
    assert x.shape == (6, shape.hidden) and x.dtype == decoder.dtype and x.is_contiguous()
    assert ids.shape == weights.shape == (6, shape.top_k)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert not (x.requires_grad or weights.requires_grad)
    for layer in range(1, shape.num_layers):
        decoder.attend(state, layer, torch.zeros(6, shape.hidden))
    assert decoder.finish(state, torch.zeros(6, shape.hidden)).shape == (1, VOCAB)


@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_y_may_have_any_combine_dtype(y_dtype):
    decoder, experts, reference = loaded("deepseek_v3", torch.bfloat16)
    tokens = sequences_of([6])[0]
    state = decoder.start(decoder.new_step(), tokens, [Piece(0, 0, 6, 6)])
    y = None
    for layer in range(decoder.shape.num_layers):
        y = naive_experts(*decoder.attend(state, layer, y), [experts[0][layer]]).to(y_dtype)
    want = reference_logits(reference, tokens)
    assert (decoder.finish(state, y)[0] - want).norm() <= 2e-2 * want.norm()


def test_shared_experts_may_be_run_early():
    decoder, experts, _ = loaded("deepseek_v3")
    tokens = sequences_of([6])[0]
    results = []
    for early in (False, True):
        state = decoder.start(decoder.new_step(), tokens, [Piece(0, 0, 6, 6)])
        y = None
        for layer in range(decoder.shape.num_layers):
            x, ids, weights = decoder.attend(state, layer, y)
            if early:
                decoder.run_shared(state)
                decoder.run_shared(state)
            y = naive_experts(x, ids, weights, [experts[0][layer]])
        results.append(decoder.finish(state, y))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_microbatch_without_tokens_passes_through(family):
    decoder, experts, _ = loaded(family)
    assert run_microbatches(decoder, experts, [(torch.empty(0, dtype=torch.int64), [])]) == {}


def test_microbatches_on_several_threads():
    decoder, experts, reference = loaded("deepseek_v3")
    sequences = sequences_of(range(3, 15))

    def prefill(tokens):
        return run_microbatches(decoder, experts, [(tokens, [Piece(0, 0, len(tokens), len(tokens))])])[0]

    with ThreadPoolExecutor(4) as pool:
        logits = dict(enumerate(pool.map(prefill, sequences)))
    assert_same_as_reference(reference, sequences, logits)


def test_bad_input_is_named():
    decoder, _, _ = loaded("mixtral")
    step = decoder.new_step()
    with pytest.raises(InputError, match=r"pieces hold 3 tokens, token_ids 4"):
        decoder.start(step, torch.arange(4), [Piece(0, 0, 3, 3)])
    with pytest.raises(InputError, match=r"\[0, 131\]; the vocabulary is \[0, 131\)"):
        decoder.start(step, torch.tensor([0, VOCAB]), [Piece(0, 0, 2, 2)])
    with pytest.raises(InputError, match="start < stop"):
        decoder.start(step, torch.arange(2), [Piece(0, 2, 4, 3)])
    with pytest.raises(InputError, match="int64"):
        decoder.start(step, torch.zeros(2), [Piece(0, 0, 2, 2)])
    state = decoder.start(step, torch.arange(2), [Piece(0, 0, 2, 2)])
    with pytest.raises(InputError, match="MoE layer 1 .* after layer -1"):
        decoder.attend(state, 1, torch.zeros(2, 64))
    decoder.attend(state, 0, None)
    with pytest.raises(InputError, match="no y"):
        decoder.attend(state, 1, None)
    with pytest.raises(InputError, match=r"\(3, 64\); \(2, 64\)"):
        decoder.attend(state, 1, torch.zeros(3, 64))


def test_a_later_piece_before_the_earlier_one_is_an_error():
    decoder, _, _ = loaded("mixtral")
    state = decoder.start(decoder.new_step(), torch.arange(3), [Piece(5, 4, 7, 7)])
    with pytest.raises(InputError, match="sequence 5 starts at token 4, but 0 earlier"):
        decoder.attend(state, 0, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_bytes_are_what_a_cut_sequence_leaves(family):
    decoder, _, _ = loaded(family)
    cache = decoder.new_step()
    state = decoder.start(cache, torch.arange(6), [Piece(0, 0, 6, 7)])
    y = None
    for layer in range(decoder.shape.num_layers):
        decoder.attend(state, layer, y)
        y = torch.zeros(6, decoder.shape.hidden)
    decoder.finish(state, y)
    assert cache.num_bytes == 6 * decoder.kept_bytes_per_token()
