"""Attention from CUDA graphs gives what attention launched kernel by kernel gives."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from pipemoe.models.loading import load_decoder
from pipemoe.models.microbatch import AttendGraphs, EagerMicrobatch, GraphedMicrobatch, start_microbatch
from pipemoe.models.step_keys import StepKeys
from tests.models.test_cuda import OWN_ATTENTION
from tests.models.test_decoder import packed, sequences_of
from tests.models.tiny import FAMILIES, naive_experts, tiny_config

pytestmark = [pytest.mark.gpu]
NUM_ROWS = 128  # buckets of 16, 64 and 128 rows
MAX_TOKENS = 150  # of a step


def started(decoder, graphs, step, sequences, pieces):
    ids, pieces = packed(sequences, pieces)
    return start_microbatch(decoder, graphs, step, ids, pieces, torch.bfloat16)


def advance(microbatch, layer, weights):
    routed = microbatch.attend(layer)
    microbatch.run_shared()
    microbatch.sums.copy_(naive_experts(*routed, [weights[layer]]))


def logits_of(decoder, graphs, step, weights, sequences, pieces):
    microbatch = started(decoder, graphs, step, sequences, pieces)
    for layer in range(decoder.shape.num_layers):
        advance(microbatch, layer, weights)
    return microbatch, microbatch.finish()


def begins_of(lengths):
    return [0, *accumulate(lengths)]


@pytest.mark.parametrize("family, changes", [(family, {}) for family in FAMILIES] + OWN_ATTENTION)
@pytest.mark.parametrize("in_places", [False, True])
def test_graphs_give_what_eager_attention_gives(family, changes, in_places):
    decoder, weights = load_decoder(
        tiny_config(family, **changes), rank=0, num_ranks=1, device="cuda", dtype=torch.bfloat16
    )
    if in_places and not decoder.caches_keys:
        pytest.skip("graphs of this family serve whole sequences only")
    with torch.cuda.stream(torch.cuda.Stream()):
        keys = StepKeys(decoder, MAX_TOKENS) if in_places else None
        graphs = AttendGraphs(decoder, torch.bfloat16, NUM_ROWS, keys)
        # Longer after shorter and back: what a step leaves in the padding must not show in the next.
        for lengths in ([1], [100], [5, 40, 1, 12], [16], [3] * 16, [17, 90], [2]):
            sequences = sequences_of(lengths)
            pieces = [(i, 0, n) for i, n in enumerate(lengths)]
            _, wanted = logits_of(decoder, None, decoder.new_step(), weights, sequences, pieces)
            step = keys.step(begins_of(lengths)) if in_places else decoder.new_step()
            microbatch, found = logits_of(decoder, graphs, step, weights, sequences, pieces)
            assert isinstance(microbatch, GraphedMicrobatch)
            assert (found - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize("graphed", [(True, True, True), (True, False, True), (False, False, False)])
@pytest.mark.parametrize("changes", [{}, dict(sliding_window=7)])
def test_pieces_of_cut_sequences(changes, graphed):
    """Microbatches of a step run side by side, each in a slot of its own, from graphs or kernel by kernel."""
    decoder, weights = load_decoder(
        tiny_config("mixtral", **changes), rank=0, num_ranks=1, device="cuda", dtype=torch.bfloat16
    )
    lengths = [30, 41, 1, 60, 18]
    sequences = sequences_of(lengths)
    cut = ([(0, 0, 30), (1, 0, 25)], [(1, 25, 26)], [(1, 26, 41), (2, 0, 1), (3, 0, 60), (4, 0, 18)])
    with torch.cuda.stream(torch.cuda.Stream()):
        _, wanted = logits_of(
            decoder, None, decoder.new_step(), weights, sequences, [(i, 0, n) for i, n in enumerate(lengths)]
        )
        keys = StepKeys(decoder, MAX_TOKENS)
        slots = [AttendGraphs(decoder, torch.bfloat16, NUM_ROWS, keys) for _ in cut]
        step = keys.step(begins_of(lengths))
        microbatches = [
            started(decoder, slot if use else None, step, sequences, pieces)
            for slot, use, pieces in zip(slots, graphed, cut)
        ]
        assert [isinstance(m, GraphedMicrobatch) for m in microbatches] == list(graphed)
        for layer in range(decoder.shape.num_layers):
            for microbatch in microbatches:
                advance(microbatch, layer, weights)
        found = torch.cat([microbatch.finish() for microbatch in microbatches])
        assert (found - wanted).norm() <= 2e-2 * wanted.norm()


def test_what_graphs_do_not_serve_runs_eagerly():
    decoder, weights = load_decoder(tiny_config("mixtral"), rank=0, num_ranks=1, device="cuda", dtype=torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        graphs = AttendGraphs(decoder, torch.bfloat16, NUM_ROWS)
        for lengths, pieces in (
            ([129], [(0, 0, 129)]),
            ([40], [(0, 0, 25)]),
            ([1] * 17, [(i, 0, 1) for i in range(17)]),
        ):
            microbatch, _ = logits_of(decoder, graphs, decoder.new_step(), weights, sequences_of(lengths), pieces)
            assert isinstance(microbatch, EagerMicrobatch)
