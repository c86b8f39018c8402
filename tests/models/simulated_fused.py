"""The fused decoder on the host, its kernels in the CUDA simulator and the library's attention by its contract.

test_fused.py runs this file in a process of its own.
"""

from types import SimpleNamespace

import pytest
import torch

from pipemoe import Config
from pipemoe.models import fused_attention, fused_decoder, products
from pipemoe.models.fused_decoder import FusedDecoder
from pipemoe.models.graph_store import GraphStore
from pipemoe.models.loading import load_decoder
from pipemoe.models.packing import Piece
from pipemoe.models.rounds import DecoderRounds, Part
from pipemoe.models.step_keys import StepKeys
from pipemoe_kernels.placed_rows import PlacedRows
from tests.models.test_decoder import packed, sequences_of
from tests.models.test_microbatch import begins_of
from tests.models.tiny import naive_experts, tiny_config

CASES = [
    ("qwen3_moe", torch.float16, {}),
    ("qwen3_moe", torch.bfloat16, dict(attention_bias=True, num_layers=3, mlp_only_layers=[0, 2])),
    ("mixtral", torch.bfloat16, dict(sliding_window=2)),
    ("deepseek_v3", torch.bfloat16, {}),
    (
        "deepseek_v3",
        torch.float16,
        dict(q_lora_rank=None, rope_interleave=False, qk_rope_head_dim=16, attention_bias=True),
    ),
]
LENGTHS = [2, 4]
CUTS = [[(0, 0, 2), (1, 0, 1)], [(1, 1, 4)]]


def flash(q, k, v, q_offsets, k_offsets, max_q, max_k, dropout, is_causal, debug, *, scale, seqused_k=None, **window):
    """Variable lengths, causal with the diagonal at the last key."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=q.dtype)
    for i in range(len(q_offsets) - 1):
        queries, first = slice(*q_offsets[i : i + 2].tolist()), int(k_offsets[i])
        num_keys = int(k_offsets[i + 1]) - first if seqused_k is None else int(seqused_k[i])
        rows = queries.stop - queries.start
        assert rows <= max_q and num_keys <= max_k
        key, value = (
            t[first : first + num_keys].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v)
        )
        mask = torch.ones(rows, num_keys, dtype=torch.bool).tril(num_keys - rows)
        if window["window_size_left"] is not None:
            mask = mask.triu(num_keys - rows - window["window_size_left"])
        scores = torch.einsum("qhd,khd->hqk", q[queries].double(), key) * scale
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        out[queries] = torch.einsum("hqk,khd->qhd", probabilities, value).to(q.dtype)
    return (out,)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch):
    multiply, route_into = torch.mm, fused_decoder.route_into

    def route_apart(logits, spec, bias, ids, weights):
        """Of two arguments that share memory the simulator forgets what one of them got."""
        apart = ids.clone(memory_format=torch.contiguous_format), weights.clone(memory_format=torch.contiguous_format)
        route_into(logits, spec, bias, *apart)
        ids.copy_(apart[0])
        weights.copy_(apart[1])

    monkeypatch.setattr(fused_decoder, "route_into", route_apart)
    monkeypatch.setattr(fused_decoder, "lack", lambda decoder: None)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)

    def multiply_in(a, b, out_dtype=None, out=None):
        return multiply(a, b, out=out) if out_dtype is None else multiply(a.float(), b.float())

    monkeypatch.setattr(torch, "mm", multiply_in)


def prefill(decoder, experts, step, rows_of):
    """Logits by sequence, and what each layer's rows were."""
    sequences = sequences_of(LENGTHS)
    states = [decoder.start(step, *packed(sequences, pieces)) for pieces in CUTS]
    ys, logits, seen = [None] * len(states), {}, []
    for layer in range(decoder.shape.num_layers):
        for i, state in enumerate(states):
            routed = rows_of(decoder, state, layer, ys[i])
            seen.append([t.clone() for t in routed])
            decoder.run_shared(state)
            ys[i] = naive_experts(*routed, [experts[layer]])
    for state, y in zip(states, ys):
        ends = [p.sequence for p in state.packing.pieces if p.stop == p.length]
        logits |= dict(zip(ends, decoder.finish(state, y)))
    return logits, seen


def placed(decoder, state, layer, y):
    """Rows whose place is read from memory, in the middle of a buffer, and nothing else of it changes."""
    wire, count = decoder.wire, state.packing.num_tokens
    buffer = torch.full((count + 2, wire.row_bytes), 0xAB, dtype=torch.uint8)
    place = PlacedRows(torch.tensor([buffer[1].data_ptr(), count]), wire.row_bytes)
    x, _, _ = decoder.attend(state, layer, y, place)
    rows = wire.rows(buffer)[1:-1]
    assert torch.equal(x, rows.hidden)
    assert bool((buffer[[0, -1]] == 0xAB).all()) and bool((buffer[:, wire.ids_offset + 4 * wire.top_k :] == 0xAB).all())
    return rows.hidden, rows.ids, rows.weights


@pytest.mark.parametrize("family, dtype, changes", CASES, ids=str)
def test_against_transformers_modules(family, dtype, changes):
    config = tiny_config(family, **{"num_layers": 2, **changes})
    plain, experts = load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=dtype)
    fused = FusedDecoder(plain)
    wanted, rows = prefill(plain, experts, plain.new_step(), lambda d, *given: d.attend(*given))
    keys = StepKeys(fused, sum(LENGTHS))
    of_step, seen = prefill(fused, experts, keys.step(begins_of(LENGTHS)), lambda d, *given: d.attend(*given))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for mine, theirs in zip(seen[:2], rows):
        assert (mine[0] - theirs[0]).float().norm() <= tolerance / 2 * theirs[0].float().norm()
    for s in range(len(LENGTHS)):
        assert (of_step[s] - wanted[s]).norm() <= tolerance * wanted[s].norm()
    again, same = prefill(fused, experts, keys.step(begins_of(LENGTHS)), placed)
    assert all(torch.equal(a, b) for x, y in zip(seen, same) for a, b in zip(x, y))
    assert all(torch.equal(of_step[s], again[s]) for s in of_step)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_products_in_parts_against_transformers_modules(monkeypatch, family):
    """Of two rows and of one."""
    monkeypatch.setattr(products, "FINE_ROWS", 1)
    monkeypatch.setattr(products, "MOST_ROWS", 2)
    assert products.row_parts(3) == [slice(0, 2), slice(2, 3)]
    test_against_transformers_modules(family, torch.bfloat16, {})


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_rotary_embeddings_that_depend_on_lengths_are_the_modules(monkeypatch, family):
    monkeypatch.setattr(fused_decoder, "ROPE_BY_LENGTH", ("default",))
    monkeypatch.setattr(FusedDecoder, "rope_table", None)
    test_against_transformers_modules(family, torch.bfloat16, {})


def test_warming_up_runs_each_count_whole_and_as_sequences_of_one_token(monkeypatch):
    """In two MoE layers, and the dense ones that stand behind the last."""
    config = tiny_config("qwen3_moe", num_layers=4, mlp_only_layers=[0, 3])
    decoder = FusedDecoder(load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.bfloat16)[0])
    keys, seen, layers = StepKeys(decoder, 3), [], []
    finish, attend = FusedDecoder.finish, FusedDecoder.attend

    def watched(decoder, state, sums):
        logits = finish(decoder, state, sums)
        seen.append((len(sums), len(logits), sums.dtype))
        return logits

    def watched_attend(decoder, state, layer, sums):
        layers.append((layer, len(state.hidden[0])))
        return attend(decoder, state, layer, sums)

    monkeypatch.setattr(FusedDecoder, "finish", watched)
    monkeypatch.setattr(FusedDecoder, "attend", watched_attend)
    decoder.warm_up(keys.step, 3, torch.float32)
    assert layers == [(layer, n) for n in (1, 1, 2, 2, 3, 3) for layer in (0, 1)]
    assert seen == [(n, sequences, torch.float32) for n in (1, 2, 3) for sequences in (n, 1)]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_rounds_take_a_sequence_chunk_by_chunk(family):
    plain, experts = load_decoder(
        tiny_config(family, num_layers=2), rank=0, num_ranks=1, device="cpu", dtype=torch.bfloat16
    )
    wanted, _ = prefill(plain, experts, plain.new_step(), lambda d, *given: d.attend(*given))
    decoder, tokens, found = FusedDecoder(plain), sequences_of(LENGTHS), {}
    config = Config(max_tokens_per_rank=2 * sum(LENGTHS))
    more = dict(writes_rows=False, keep_logits=True)
    rounds = DecoderRounds(decoder, GraphStore(decoder), config, torch.float32, [1 + sum(LENGTHS)], **more)
    for sequence, length in enumerate(LENGTHS):
        assert rounds.reserve(0, sequence, length)
    for pieces in CUTS:
        parts = [Part(*piece, tokens[piece[0]]) for piece in pieces]
        source = rounds.source(0, parts, lambda first: found.update({first.sequence: first.logits}))
        count = sum(stop - start for _, start, stop in pieces)
        source.begin(SimpleNamespace(cohorts=[SimpleNamespace(tokens_of=lambda rank, count=count: count)]), 0)
        for layer in range(decoder.shape.num_layers):
            source.attend(0, layer)
            rows = source.rows(0, 0, count)
            source.side_work(0)
            source.results(0, 0, count).copy_(naive_experts(*rows, [experts[layer]]))
        source.finish(0)
        source.finished(0, 0.0)
    for sequence in range(len(LENGTHS)):
        assert (found[sequence] - wanted[sequence]).norm() <= 2e-2 * wanted[sequence].norm()


def rows_multiplied(monkeypatch):
    """A list that gets every product of the library: its kind, and its number of rows."""
    seen, mm, addmm, linear = [], torch.mm, torch.Tensor.addmm_, torch.nn.Linear.forward

    def watched(a, b, **more):
        seen.append(("product", b.shape, a.stride(), len(a)))
        return mm(a, b, **more)

    def watched_addmm(into, a, b):
        seen.append(("sum", b.shape, a.stride(), len(a)))
        return addmm(into, a, b)

    def watched_linear(module, a):
        seen.append(("linear", module.weight.shape, a.stride(), len(a)))
        return linear(module, a)

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setattr(torch.Tensor, "addmm_", watched_addmm)
    monkeypatch.setattr(torch.nn.Linear, "forward", watched_linear)
    return seen


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_warming_up_runs_every_product_that_a_step_may_need(monkeypatch, family):
    """Parts are of up to 4 rows here, or of 8, and there are at most four sequences in a call."""
    for module in (products, fused_attention):
        monkeypatch.setattr(module, "FINE_ROWS", 4)
        monkeypatch.setattr(module, "MOST_ROWS", 8)
    monkeypatch.setattr(fused_decoder, "_MOST_SEQUENCES", 4)
    monkeypatch.setattr(fused_decoder, "row_counts", lambda most: [2, 4, most])  # 1 and 3 are gaps
    config = tiny_config(family, num_layers=2)
    decoder = FusedDecoder(load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.bfloat16)[0])
    seen = rows_multiplied(monkeypatch)
    decoder.warm_up(StepKeys(decoder, 8).step, 8, torch.float32)
    of_steps = set(seen)
    decoder.warm_up_keys(12)
    warm = set(seen)
    del seen[:]
    monkeypatch.setattr(FusedDecoder, "rope_table", None)  # a step that makes it longer would wait for the device
    of_a_step = [Piece(0, 0, 3, 3)], [Piece(i, 0, 1, 1) for i in range(7)], [Piece(0, 2, 5, 5)]
    of_a_round = [Piece(0, 9, 12, 12)]
    for pieces in (*of_a_step, of_a_round):
        count = sum(piece.stop - piece.start for piece in pieces)
        keys = StepKeys(decoder, 12).step(list(range(len(pieces))))
        state = decoder.start(keys, torch.zeros(count, dtype=torch.long), pieces)
        decoder.attend(state, 0, None)
        state.layer = decoder.shape.num_layers - 1
        decoder.finish(state, torch.zeros(count, decoder.shape.hidden))
        assert set(seen) <= (warm if pieces == of_a_round else of_steps)
    assert {rows for *_, rows in seen} == {1, 3, 4} | ({8} if family == "deepseek_v3" else set())
