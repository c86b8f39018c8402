"""DeepSeek-V3 and R1: MLA, dense first layers, bias-corrected group-limited sigmoid routing, shared experts.

Their checkpoints also have multi-token-prediction layers behind the last decoder layer; these are not read.
"""

from __future__ import annotations

from pipemoe.model_facts.facts import read_facts
from pipemoe.models.families.family import Family
from pipemoe.models.routing import SIGMOID, RoutingSpec


class DeepseekV3(Family):
    model_type = "deepseek_v3"
    plain_rms_norm = True

    def num_experts(self, config) -> int:
        return config.n_routed_experts

    def moe_layers(self, config) -> list[int]:
        return list(read_facts(config.to_dict()).moe_layers)

    def routing(self, config) -> RoutingSpec:
        return RoutingSpec(
            num_experts=self.num_experts(config),
            top_k=self.top_k(config),
            scoring=SIGMOID,
            renormalise=config.norm_topk_prob,
            logits_in_float32=True,
            num_groups=config.n_group,
            top_groups=config.topk_group,
            scale=config.routed_scaling_factor,
        )


FAMILY = DeepseekV3()
