"""Attention from CUDA graphs gives what attention launched kernel by kernel gives."""

from __future__ import annotations

import pytest
import torch

from pipemoe.models.loading import load_decoder
from pipemoe.models.microbatch import AttendGraphs, EagerMicrobatch, GraphedMicrobatch, start_microbatch
from tests.models.test_decoder import packed, sequences_of
from tests.models.tiny import FAMILIES, naive_experts, tiny_config

pytestmark = [pytest.mark.gpu]
MAX_TOKENS = 100  # buckets of 16, 64 and 128 rows


def logits_of(decoder, graphs, weights, sequences, pieces):
    ids, pieces = packed(sequences, pieces)
    microbatch = start_microbatch(decoder, graphs, decoder.new_step(), ids, pieces, torch.bfloat16)
    for layer in range(decoder.shape.num_layers):
        routed = microbatch.attend(layer)
        assert len(routed[0]) == len(ids)
        microbatch.run_shared()
        microbatch.sums.copy_(naive_experts(*routed, [weights[layer]]))
    return microbatch, microbatch.finish()


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_what_eager_attention_gives(family):
    decoder, weights = load_decoder(tiny_config(family), rank=0, num_ranks=1, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        graphs = AttendGraphs(decoder, torch.bfloat16, MAX_TOKENS)
        # Longer after shorter and back: what a step leaves in the padding must not show in the next.
        for lengths in ([1], [100], [5, 40, 1, 12], [16], [3] * 16, [17, 90], [2]):
            sequences = sequences_of(lengths)
            pieces = [(i, 0, n) for i, n in enumerate(lengths)]
            _, wanted = logits_of(decoder, None, weights, sequences, pieces)
            microbatch, found = logits_of(decoder, graphs, weights, sequences, pieces)
            assert isinstance(microbatch, GraphedMicrobatch)
            assert (found - wanted).norm() <= 2e-2 * wanted.norm()


def test_what_graphs_do_not_serve_runs_eagerly():
    decoder, weights = load_decoder(tiny_config("mixtral"), rank=0, num_ranks=1, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        graphs = AttendGraphs(decoder, torch.bfloat16, MAX_TOKENS)
        for lengths, pieces in (([129], [(0, 0, 129)]), ([40], [(0, 0, 25)]), ([1] * 17, [(i, 0, 1) for i in range(17)])):
            microbatch, _ = logits_of(decoder, graphs, weights, sequences_of(lengths), pieces)
            assert isinstance(microbatch, EagerMicrobatch)
