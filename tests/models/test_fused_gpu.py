"""The fused decoder against transformers' modules: operation by operation, whole, cut, packed, in graphs."""

from __future__ import annotations

import pytest
import torch

from pipemoe.models.decoder import Piece
from pipemoe.models.fused_decoder import FusedDecoder, lack
from pipemoe.models.loading import load_decoder
from pipemoe.models.microbatch import AttendGraphs, GraphedMicrobatch, start_microbatch
from pipemoe.models.random_weights import reference_model
from pipemoe.models.step_keys import StepKeys
from tests.models.test_decoder import packed, reference_logits, sequences_of
from tests.models.test_microbatch import begins_of, logits_of
from tests.models.tiny import FAMILIES, naive_experts, tiny_config

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
OF_ROWS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3}  # by norm ratio, before any router has chosen
OF_LOGITS = 2e-2  # a rounding may change what a router chooses
CASES = [
    *((family, {}) for family in FAMILIES),
    ("mixtral", dict(sliding_window=7)),
    ("qwen3_moe", dict(attention_bias=True, mlp_only_layers=[0, 3], num_layers=4)),
    ("qwen3_moe", dict(head_dim=80, num_key_value_heads=4)),
    ("deepseek_v3", dict(q_lora_rank=None)),
    ("deepseek_v3", dict(rope_interleave=False, qk_rope_head_dim=16)),
]
LENGTHS = [5, 40, 1, 12]
CUTS = [[(0, 0, 5), (1, 0, 17)], [(1, 17, 30), (2, 0, 1)], [(1, 30, 31)], [(3, 0, 12), (1, 31, 40)]]


def load(family, changes, dtype):
    """The plain decoder, the fused one of the same weights, and the experts."""
    plain, experts = load_decoder(tiny_config(family, **changes), rank=0, num_ranks=1, device="cuda", dtype=dtype)
    if lack(plain):
        pytest.skip(lack(plain))
    return plain, FusedDecoder(plain), experts


def prefill(decoder, experts, sequences, cuts):
    """Logits by sequence; also the rows of the first MoE layer of each microbatch."""
    lengths = [len(s) for s in sequences]
    step = StepKeys(decoder, sum(lengths)).step(begins_of(lengths)) if decoder.keys_in_places else decoder.new_step()
    states = [decoder.start(step, *packed(sequences, pieces)) for pieces in cuts]
    ys, first = [None] * len(states), []
    for layer in range(decoder.shape.num_layers):
        for i, state in enumerate(states):
            routed = decoder.attend(state, layer, ys[i])
            if layer == 0:
                first.append([t.clone() for t in routed])
            ys[i] = naive_experts(*routed, [experts[layer]])
    logits = {}
    for state, y in zip(states, ys):
        ends = [p.sequence for p in state.packing.pieces if p.stop == p.length]
        logits |= dict(zip(ends, decoder.finish(state, y)))
    return logits, first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family, changes", CASES, ids=str)
def test_packed_and_cut_sequences(family, changes, dtype):
    plain, fused, experts = load(family, changes, dtype)
    reference = reference_model(tiny_config(family, **changes), "cuda", dtype)
    sequences = sequences_of(LENGTHS)
    wanted, wanted_rows = prefill(plain, experts, sequences, CUTS)
    found, rows = prefill(fused, experts, sequences, CUTS)
    for mine, theirs in zip(rows, wanted_rows):
        assert (mine[0].double() - theirs[0].double()).norm() <= OF_ROWS[dtype] * theirs[0].double().norm()
    for s, tokens in enumerate(sequences):
        exact = reference_logits(reference, tokens.cuda())
        for want in (exact, wanted[s]):
            assert (found[s] - want).norm() <= OF_LOGITS * want.norm()


@pytest.mark.parametrize("family, changes", CASES[:5], ids=str)
def test_rows_do_not_depend_on_their_neighbours(family, changes):
    _, fused, experts = load(family, changes, torch.bfloat16)
    sequences = sequences_of([33, 7, 20])
    together, rows = prefill(fused, experts, sequences, [[(0, 0, 33), (1, 0, 7), (2, 0, 20)]])
    alone, own = prefill(fused, experts, sequences, [[(1, 0, 7)]])
    assert all(torch.equal(a[33:40], b) for a, b in zip(rows[0], own[0]))


@pytest.mark.parametrize("family, changes", CASES, ids=str)
def test_graphs_give_what_eager_attention_gives(family, changes):
    _, fused, experts = load(family, changes, torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):
        keys = StepKeys(fused, 150)
        graphs = AttendGraphs(fused, torch.bfloat16, 128, keys)
        for lengths in ([1], [100], [5, 40, 1, 12], [16], [3] * 16, [17, 90], [2]):
            sequences = sequences_of(lengths)
            pieces = [(i, 0, n) for i, n in enumerate(lengths)]
            step = keys.step(begins_of(lengths))
            _, wanted = logits_of(fused, None, step, experts, sequences, pieces)
            microbatch, found = logits_of(fused, graphs, step, experts, sequences, pieces)
            assert isinstance(microbatch, GraphedMicrobatch)
            assert (found - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graphed", [False, True])
def test_rows_are_written_where_they_travel_from_and_nowhere_else(family, graphed):
    """Rows of other ranks on both sides, and those of a bucket's padding, stay as they were."""
    _, fused, _ = load(family, {}, torch.bfloat16)
    wire, (tokens,) = fused.wire, sequences_of([21])
    buffers = [torch.full((150, wire.row_bytes), 0xAB, dtype=torch.uint8, device="cuda") for _ in range(2)]
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        keys = StepKeys(fused, 150)
        graphs = AttendGraphs(fused, torch.bfloat16, 64, keys) if graphed else None
        for start in (40, 3):
            microbatch, plain = (
                start_microbatch(fused, g, keys.step([0]), tokens, [Piece(0, 0, 21, 21)], torch.bfloat16)
                for g in (graphs, None)
            )
            for layer in range(fused.shape.num_layers):
                buffer = buffers[layer % 2]
                rows = wire.rows(buffer)[start : start + 21]
                wanted = [t.clone() for t in plain.attend(layer)]
                microbatch.attend(layer, rows)
                for found, want in zip((rows.hidden, rows.ids, rows.weights), wanted):
                    if found is rows.ids:
                        assert (found == want).float().mean() > 0.9
                    else:
                        assert (found.double() - want.double()).norm() <= 2e-2 * want.double().norm()
                plain.run_shared()
                microbatch.run_shared()
                rows.buffer[:, : wire.ids_offset + 4 * wire.top_k] = 0xAB
                assert bool((buffer == 0xAB).all())


def test_a_microbatch_without_tokens():
    _, fused, experts = load("qwen3_moe", {}, torch.bfloat16)
    state = fused.start(StepKeys(fused, 3).step([]), torch.zeros(0, dtype=torch.long), [])
    for layer in range(fused.shape.num_layers):
        x, ids, weights = fused.attend(state, layer, None if layer == 0 else torch.zeros(0, 64, device="cuda"))
        assert x.shape == (0, 64) and ids.shape == weights.shape == (0, 3)
        fused.run_shared(state)
    assert fused.finish(state, torch.zeros(0, 64, device="cuda")).shape == (0, fused.vocab_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_for_the_device(family):
    _, fused, _ = load(family, {}, torch.bfloat16)
    sequences, keys = sequences_of([9, 14]), StepKeys(fused, 23)

    def run():
        for pieces in ([(0, 0, 9), (1, 0, 6)], [(1, 6, 14)]):
            state, y = fused.start(keys.step([0, 9]), *packed(sequences, pieces)), None
            for layer in range(fused.shape.num_layers):
                x, _, _ = fused.attend(state, layer, y)
                fused.run_shared(state)
                y = torch.zeros(x.shape, device="cuda")
            fused.finish(state, y)

    run()  # first use loads modules and plans, which may synchronise
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
