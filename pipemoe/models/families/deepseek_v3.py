"""DeepSeek-V3 and R1: MLA, dense first layers, bias-corrected group-limited sigmoid routing, shared experts.

Their checkpoints also have multi-token-prediction layers behind the last decoder layer; these are not read.
"""

from __future__ import annotations

from pipemoe.model_facts.facts import read_facts
from pipemoe.models.attention_form import AttentionForm, LatentForm
from pipemoe.models.families.family import Family
from pipemoe.models.routing import SIGMOID, RoutingSpec


class DeepseekV3(Family):
    model_type = "deepseek_v3"
    plain_rms_norm = True

    def num_experts(self, config) -> int:
        return config.n_routed_experts

    def moe_layers(self, config) -> list[int]:
        return list(read_facts(config.to_dict()).moe_layers)

    def attention(self, config) -> AttentionForm:
        return AttentionForm(
            num_query=config.num_attention_heads,
            num_key=config.num_attention_heads,
            head_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
            rotary=config.qk_rope_head_dim,
            interleaved=config.rope_interleave,
            biased=config.attention_bias,
            latent=LatentForm(
                query_rank=config.q_lora_rank,
                rank=config.kv_lora_rank,
                nope=config.qk_nope_head_dim,
                rope=config.qk_rope_head_dim,
                value=config.v_head_dim,
            ),
        )

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
