"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): softmax top-k, no shared experts."""

from __future__ import annotations

from pipemoe.models.families.family import Family
from pipemoe.models.routing import SOFTMAX, RoutingSpec


class Qwen3Moe(Family):
    model_type = "qwen3_moe"
    plain_rms_norm = True

    def moe_layers(self, config) -> list[int]:
        return [
            layer
            for layer in range(config.num_hidden_layers)
            if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        ]

    def routing(self, config) -> RoutingSpec:
        return RoutingSpec(
            num_experts=self.num_experts(config),
            top_k=self.top_k(config),
            scoring=SOFTMAX,
            renormalise=config.norm_topk_prob,
            round_weights=True,
        )


FAMILY = Qwen3Moe()
