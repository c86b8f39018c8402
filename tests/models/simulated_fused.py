"""The fused decoder on the host, its kernels in the CUDA simulator and the library's attention by its contract.

test_fused.py runs this file in a process of its own.
"""

import pytest
import torch

from pipemoe.models import fused_decoder, products
from pipemoe.models.fused_decoder import FusedDecoder
from pipemoe.models.loading import load_decoder
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


@pytest.mark.parametrize("most", [3, 2 * products.MOST_ROWS + 5])
def test_warming_up_expands_latents_in_all_numbers_of_rows_that_earlier_chunks_may_have(monkeypatch, most):
    config = tiny_config("deepseek_v3", num_layers=1, first_k_dense_replace=0)
    decoder = FusedDecoder(load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.bfloat16)[0])
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda x, *given, **more: seen.append(len(x)) or mm(x, *given, **more))
    decoder.warm_up_keys(most)
    sizes = {part.stop - part.start for rows in range(1, most + 1) for part in products.row_parts(rows)}
    assert {size for size in sizes if size > products.FINE_ROWS} <= set(seen) and max(seen) <= max(sizes)
    assert set(products.row_counts(min(most, products.FINE_ROWS))) <= set(seen)
    assert sum(seen[-len(products.row_parts(most)) :]) == most  # at last all, for the memory


def test_warming_up_keys_runs_nothing_where_keys_are_kept_as_they_are(monkeypatch):
    config = tiny_config("qwen3_moe", num_layers=1)
    decoder = FusedDecoder(load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.bfloat16)[0])
    monkeypatch.setattr(torch, "mm", None)
    decoder.warm_up_keys(100)
