"""Mixtral (8x7B, 8x22B): softmax top-2, always renormalised. Its checkpoints say block_sparse_moe, w1 (gate), w2
(down), w3 (up).
"""

from __future__ import annotations

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

    def routing(self, config) -> RoutingSpec:
        return RoutingSpec(
            num_experts=self.num_experts(config), top_k=self.top_k(config), scoring=SOFTMAX, renormalise=True
        )

    def checkpoint_names(self, name: str) -> list[str]:
        return list(dict.fromkeys((name.replace(".mlp.", ".block_sparse_moe."), name)))


FAMILY = Mixtral()
