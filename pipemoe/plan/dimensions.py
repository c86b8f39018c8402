"""A model's dimensions, as far as they decide what its operations cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipemoe.errors import ConfigError
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
    """From a transformers config as a mapping: Qwen3-MoE, Mixtral or DeepSeek-V3. Raises ConfigError for others."""
    try:
        return _BY_TYPE[config["model_type"]](config)
    except KeyError as error:
        raise ConfigError(f"config of {config.get('model_type')!r}: no {error}; known types: {', '.join(_BY_TYPE)}") from None


def dimensions_of_decoder(config: Mapping[str, Any], shape: ModelShape) -> Dimensions:
    """Of a loaded decoder, which knows its shape: from its config as far as that is understood."""
    try:
        return replace(dimensions_of(config), shape=shape)
    except ConfigError:
        return dimensions_of_shape(shape)


def dimensions_of_shape(shape: ModelShape) -> Dimensions:
    """Where attention is the caller's and unknown: four projections H x H, heads as wide as H together."""
    return Dimensions(shape, 4 * shape.hidden**2 + shape.hidden * shape.num_experts, 4 * shape.hidden)


def _num_experts(config: Mapping[str, Any]) -> int:
    """Configs on disk name it by family; transformers writes the last for all."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    found = [config[name] for name in names if config.get(name)]
    if not found:
        raise KeyError(names[-1])
    return found[0]


def _grouped_query(config: Mapping[str, Any], intermediate: str) -> Dimensions:
    hidden, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or hidden // heads
    shape = ModelShape(hidden, config[intermediate], _num_experts(config), config["num_experts_per_tok"], config["num_hidden_layers"])
    attention = 2 * hidden * width * (heads + groups)
    return Dimensions(shape, attention + hidden * shape.num_experts, 4 * heads * width)


def _latent(config: Mapping[str, Any]) -> Dimensions:
    """DeepSeek's latent attention, computed with keys and values written out (prefill); dense layers first."""
    hidden, heads, intermediate = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    rope, nope, values = config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
    dense = config["first_k_dense_replace"]
    num_layers = config["num_hidden_layers"] - dense
    shape = ModelShape(hidden, intermediate, _num_experts(config), config["num_experts_per_tok"], num_layers)
    queries = config["q_lora_rank"] * (hidden + heads * (nope + rope)) if config["q_lora_rank"] else hidden * heads * (nope + rope)
    keys = hidden * (config["kv_lora_rank"] + rope) + config["kv_lora_rank"] * heads * (nope + values)
    attention = queries + keys + heads * values * hidden
    pair_flops = 2 * heads * (nope + rope + values)
    shared = 3 * hidden * intermediate * config["n_shared_experts"] + hidden * shape.num_experts
    return Dimensions(shape, attention + shared, pair_flops, dense, attention + 3 * hidden * config["intermediate_size"] if dense else 0)


_BY_TYPE = {
    "qwen3_moe": lambda config: _grouped_query(config, "moe_intermediate_size"),
    "mixtral": lambda config: _grouped_query(config, "intermediate_size"),
    "deepseek_v3": _latent,
}
