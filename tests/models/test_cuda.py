"""The decoder on a GPU: parity with the plain forward there, and no host synchronisation anywhere."""

from __future__ import annotations

import pytest
import torch

from pipemoe.models.decoder import Piece
from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import reference_model
from tests.models.test_decoder import packed, reference_logits, sequences_of
from tests.models.tiny import FAMILIES, naive_experts, run_microbatches, tiny_config

pytestmark = pytest.mark.gpu

MICROBATCHES = [[(0, 0, 5), (1, 0, 17)], [(1, 17, 30), (2, 0, 1)], [(1, 30, 31)], [(3, 0, 12), (1, 31, 40)]]
LENGTHS = [5, 40, 1, 12]
# Heads of the sizes that our own attention kernel is for.
OWN_ATTENTION = [
    ("qwen3_moe", dict(head_dim=128)),
    ("mixtral", dict(head_dim=64, sliding_window=7)),
    ("deepseek_v3", dict(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, changes", [(family, {}) for family in FAMILIES] + [("mixtral", dict(sliding_window=7))] + OWN_ATTENTION
)
def test_parity_on_the_gpu(family, changes, dtype):
    config = tiny_config(family, **changes)
    parts = [load_decoder(config, rank=r, num_ranks=2, device="cuda", dtype=dtype) for r in range(2)]
    reference = reference_model(config, "cuda", dtype)
    sequences = sequences_of(LENGTHS)
    microbatches = [packed(sequences, pieces) for pieces in MICROBATCHES]
    logits = run_microbatches(parts[0][0], [weights for _, weights in parts], microbatches)
    for s, tokens in enumerate(sequences):
        want = reference_logits(reference, tokens.cuda())
        assert (logits[s] - want).norm() <= (1e-4 if dtype == torch.float32 else 2e-2) * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family, changes", [(family, {}) for family in FAMILIES] + OWN_ATTENTION)
def test_nothing_waits_for_the_device(family, changes, dtype):
    decoder, weights = load_decoder(tiny_config(family, **changes), rank=0, num_ranks=1, device="cuda", dtype=dtype)
    sequences = sequences_of([9, 14])

    def prefill():
        step = decoder.new_step()
        states = [decoder.start(step, *packed(sequences, pieces)) for pieces in ([(0, 0, 9), (1, 0, 6)], [(1, 6, 14)])]
        logits = []
        for state in states:
            y = None
            for layer in range(decoder.shape.num_layers):
                x, ids, _ = decoder.attend(state, layer, y)
                decoder.run_shared(state)
                y = torch.zeros(x.shape, device="cuda")
            logits.append(decoder.finish(state, y))
        return logits

    prefill()  # first use loads modules and plans, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefill()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pieces_of_one_sequence_on_two_streams():
    decoder, weights = load_decoder(
        tiny_config("deepseek_v3"), rank=0, num_ranks=1, device="cuda", dtype=torch.bfloat16
    )
    (tokens,) = sequences_of([40])
    whole = run_microbatches(decoder, [weights], [(tokens, [Piece(0, 0, 40, 40)])])[0]
    torch.cuda.synchronize()
    step = decoder.new_step()
    cuts = [Piece(0, 0, 25, 40), Piece(0, 25, 40, 40)]
    streams, states, ys = [torch.cuda.Stream() for _ in cuts], [], [None, None]
    for stream, piece in zip(streams, cuts):
        with torch.cuda.stream(stream):
            states.append(decoder.start(step, tokens[piece.start : piece.stop], [piece]))
    for layer in range(decoder.shape.num_layers):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                stream.wait_stream(streams[0])
                ys[i] = naive_experts(*decoder.attend(states[i], layer, ys[i]), [weights[layer]])
    with torch.cuda.stream(streams[1]):
        cut = decoder.finish(states[1], ys[1])[0]
    torch.cuda.synchronize()
    assert (cut - whole).norm() <= 2e-2 * whole.norm()
