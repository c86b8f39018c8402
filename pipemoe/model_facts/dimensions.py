"""The dimensions that a model's config.json gives the planner's costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipemoe.errors import ConfigError
from pipemoe.model_facts.facts import Latent, ModelFacts
from pipemoe.model_facts.limits import supported_facts
from pipemoe.plan.cost.dimensions import Dimensions, dimensions_of_shape
from pipemoe.plan.schedule import ModelShape


def dimensions_of(config: Mapping[str, Any]) -> Dimensions:
    """From a config.json's content: Qwen3-MoE, Mixtral or DeepSeek-V3. Raises ConfigError for others, and for what
    these do not do.
    """
    return dimensions_of_facts(supported_facts(config))


def dimensions_of_decoder(config: Mapping[str, Any], shape: ModelShape) -> Dimensions:
    """Of a loaded decoder, which knows its shape; the rest from its config, if that is a known family's."""
    try:
        return replace(dimensions_of(config), shape=shape)
    except ConfigError:
        return dimensions_of_shape(shape)


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
