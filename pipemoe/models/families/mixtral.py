"""Mixtral (8x7B, 8x22B): softmax top-2, always renormalised. Its checkpoints say block_sparse_moe, w1 (gate), w2
(down), w3 (up).
"""

from __future__ import annotations

from pipemoe.models.attention_form import AttentionForm
from pipemoe.models.families.family import Family
from pipemoe.models.routing import SOFTMAX, RoutingSpec


class Mixtral(Family):
    model_type = "mixtral"
    plain_rms_norm = True
    block_name = "model.layers.{layer}.block_sparse_moe"
    expert_parts = ("w1", "w3", "w2")

    def num_experts(self, config) -> int:
        return config.num_local_experts

    def intermediate(self, config) -> int:
        return config.intermediate_size

    def attention(self, config) -> AttentionForm:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return AttentionForm(
            num_query=config.num_attention_heads,
            num_key=config.num_key_value_heads,
            head_dim=head_dim,
            rotary=head_dim,
            window=config.sliding_window,
        )

    def routing(self, config) -> RoutingSpec:
        return RoutingSpec(
            num_experts=self.num_experts(config), top_k=self.top_k(config), scoring=SOFTMAX, renormalise=True
        )

    def checkpoint_names(self, name: str) -> list[str]:
        return list(dict.fromkeys((name.replace(".mlp.", ".block_sparse_moe."), name)))


FAMILY = Mixtral()
