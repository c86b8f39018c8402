"""Tiny configs of every family, and a naive expert layer that completes a forward without the conductor."""

from __future__ import annotations

import torch

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
VOCAB = 131


def tiny_config(family: str, num_layers: int = 3, num_experts: int = 8, **changes):
    """A transformers config with hidden 64; `num_layers` counts decoder layers (DeepSeek's first is dense)."""
    from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig

    common = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    if family == "qwen3_moe":
        own = dict(
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=96,
            moe_intermediate_size=48,
            num_experts=num_experts,
            num_experts_per_tok=min(3, num_experts),
            norm_topk_prob=True,
        )
        return Qwen3MoeConfig(**common | own | changes)
    if family == "mixtral":
        own = dict(
            num_key_value_heads=2,
            intermediate_size=48,
            num_local_experts=num_experts,
            num_experts_per_tok=min(2, num_experts),
        )
        return MixtralConfig(**common | own | changes)
    if family == "deepseek_v3":
        own = dict(
            num_key_value_heads=4,
            intermediate_size=96,
            moe_intermediate_size=32,
            n_routed_experts=num_experts,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=4 if num_experts % 4 == 0 else 1,
            topk_group=2 if num_experts % 4 == 0 else 1,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=1,
        )
        return DeepseekV3Config(**common | own | changes)
    raise ValueError(f"no tiny config for {family!r}")


def naive_experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer_weights) -> torch.Tensor:
    """The routed experts' sum [T, H] float32, token by token; `layer_weights` are all ranks' ExpertWeights of one
    layer.
    """
    where = {w.first_expert + i: (w, i) for w in layer_weights for i in range(w.num_local_experts)}
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for t in range(len(x)):
        for k in range(ids.shape[1]):
            rank_weights, local = where[int(ids[t, k])]
            gate, up = (rank_weights.gate_up[local] @ x[t]).chunk(2)
            y = rank_weights.down[local] @ (torch.nn.functional.silu(gate) * up)
            out[t] += weights[t, k] * y.float()
    return out


def run_microbatches(decoder, experts, microbatches) -> dict[int, torch.Tensor]:
    """Prefill without the conductor, layer by layer; returns last-token logits [V] by sequence.

    experts: per rank, the list of ExpertWeights. microbatches: (token ids, pieces) pairs, earlier pieces first.
    """
    step = decoder.new_step()
    states = [decoder.start(step, torch.as_tensor(ids), pieces) for ids, pieces in microbatches]
    ys = [None] * len(states)
    for layer in range(decoder.shape.num_layers):
        layer_weights = [rank_weights[layer] for rank_weights in experts]
        for i, state in enumerate(states):
            ys[i] = naive_experts(*decoder.attend(state, layer, ys[i]), layer_weights)
    logits = {}
    for (_, pieces), state, y in zip(microbatches, states, ys):
        ends = [p.sequence for p in pieces if p.stop == p.length]
        rows = decoder.finish(state, y)
        assert rows.shape == (len(ends), decoder.vocab_size) and rows.dtype == torch.float32
        logits |= dict(zip(ends, rows))
    return logits
