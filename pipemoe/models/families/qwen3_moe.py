"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): softmax top-k, no shared experts."""

from __future__ import annotations

from pipemoe.model_facts.facts import read_facts
from pipemoe.models.attention_form import AttentionForm
from pipemoe.models.families.family import Family
from pipemoe.models.routing import SOFTMAX, RoutingSpec


class Qwen3Moe(Family):
    model_type = "qwen3_moe"
    plain_rms_norm = True

    def moe_layers(self, config) -> list[int]:
        return list(read_facts(config.to_dict()).moe_layers)

    def attention(self, config) -> AttentionForm:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return AttentionForm(
            num_query=config.num_attention_heads,
            num_key=config.num_key_value_heads,
            head_dim=head_dim,
            rotary=head_dim,
            head_norms=True,
            biased=config.attention_bias,
            window=config.sliding_window,
        )

    def routing(self, config) -> RoutingSpec:
        return RoutingSpec(
            num_experts=self.num_experts(config),
            top_k=self.top_k(config),
            scoring=SOFTMAX,
            renormalise=config.norm_topk_prob,
            round_weights=True,
        )


FAMILY = Qwen3Moe()
