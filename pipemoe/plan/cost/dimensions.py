"""A model's dimensions, as far as they decide what its operations cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipemoe.errors import ConfigError
from pipemoe.plan.cost.model_facts import Latent, ModelFacts
from pipemoe.plan.cost.model_limits import supported_facts
from pipemoe.plan.schedule import ModelShape


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Per MoE layer, unless said otherwise; weights in numbers of values, whatever their type."""

    shape: ModelShape
    dense_weights: int  # attention, router and shared experts: multiplied with every token of the own rank
    pair_flops: int  # of attention, per pair of a query and a key it may see, all heads
    num_dense_layers: int = 0  # before the first MoE layer
    dense_layer_weights: int = 0  # of one of them

    @property
    def expert_weights(self) -> int:
        """Values in one expert's gate, up and down projections."""
        return 3 * self.shape.hidden * self.shape.intermediate


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """From a config.json's content: Qwen3-MoE, Mixtral or DeepSeek-V3. Raises ConfigError for others, and for what
    these do not do.
    """
    return dimensions_of_facts(supported_facts(config))


def dimensions_of_decoder(config: Mapping[str, Any], shape: ModelShape) -> Dimensions:
    """Of a loaded decoder, which knows its shape: from its config as far as that is understood."""
    try:
        return replace(dimensions_of(config), shape=shape)
    except ConfigError:
        return dimensions_of_shape(shape)


def dimensions_of_shape(shape: ModelShape) -> Dimensions:
    """For a caller's own attention, which is unknown: four projections H x H, all heads together as wide as H."""
    return Dimensions(shape, 4 * shape.hidden**2 + shape.hidden * shape.num_experts, 4 * shape.hidden)


def dimensions_of_facts(facts: ModelFacts) -> Dimensions:
    """Dense layers after the first MoE layer are added to the MoE layers, in equal parts: attention of an MoE layer
    includes the dense layers before it.
    """
    hidden, num_moe = facts.hidden, len(facts.moe_layers)
    shape = ModelShape(hidden, facts.intermediate, facts.num_experts, facts.top_k, num_moe)
    if facts.latent:
        attention, pair_flops = _latent(facts, facts.latent)
    else:
        attention = 2 * hidden * facts.head_dim * (facts.num_heads + facts.num_key_value_heads)
        pair_flops = 4 * facts.num_heads * facts.head_dim
    in_layer = attention + 3 * hidden * facts.shared_intermediate + hidden * facts.num_experts
    first = facts.num_dense_layers_first
    between = facts.num_layers - num_moe - first
    of_dense = attention + 3 * hidden * facts.dense_intermediate
    in_layer += between * of_dense // num_moe
    pair_flops_all = pair_flops + between * pair_flops // num_moe
    return Dimensions(shape, in_layer, pair_flops_all, first, of_dense if first else 0)


def _latent(facts: ModelFacts, latent: Latent) -> tuple[int, int]:
    """Weights, and flops per pair of tokens, of DeepSeek's latent attention in prefill: keys and values written out."""
    hidden, heads, keys = facts.hidden, facts.num_heads, latent.nope + latent.rope
    queries = latent.query_rank * (hidden + heads * keys) if latent.query_rank else hidden * heads * keys
    key_values = hidden * (latent.key_rank + latent.rope) + latent.key_rank * heads * (latent.nope + latent.values)
    return queries + key_values + heads * latent.values * hidden, 2 * heads * (keys + latent.values)
