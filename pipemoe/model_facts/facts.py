"""Reads what a config.json says of a model, for plans and for loading. Pure Python: no transformers, no torch.

A missing field has the default that transformers gives it in that family. A null field is what the family's modules in
transformers make of it: a flag is false, heads and ranks have meanings of their own, and where transformers takes no
null it is refused. Newer and older names are the same field: rope_parameters and rope_scaling; num_local_experts,
num_experts and n_routed_experts. limits.py refuses what is not implemented for a family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipemoe.arguments import shown
from pipemoe.errors import ConfigError

_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")  # names of one field
# Whole numbers: the default and the least value.
_COMMON = {"num_hidden_layers": (32, 1), "num_attention_heads": (32, 1), "vocab_size": (32000, 1)}
_COUNTS: dict[str, dict[str, tuple[int, int]]] = {
    "qwen3_moe": {
        **_COMMON,
        "vocab_size": (151936, 1),
        "hidden_size": (2048, 1),
        "intermediate_size": (6144, 1),
        "num_hidden_layers": (24, 1),
        "num_key_value_heads": (4, 1),
        "max_position_embeddings": (32768, 1),
        "decoder_sparse_step": (1, 1),
        "moe_intermediate_size": (768, 1),
        "num_experts_per_tok": (8, 1),
        "num_experts": (128, 1),
    },
    "mixtral": {
        **_COMMON,
        "hidden_size": (4096, 1),
        "intermediate_size": (14336, 1),
        "num_key_value_heads": (8, 1),
        "max_position_embeddings": (131072, 1),
        "num_experts_per_tok": (2, 1),
        "num_experts": (8, 1),
    },
    "deepseek_v3": {
        "vocab_size": (129280, 1),
        "hidden_size": (7168, 1),
        "intermediate_size": (18432, 1),
        "moe_intermediate_size": (2048, 1),
        "num_hidden_layers": (61, 1),
        "num_attention_heads": (128, 1),
        "num_key_value_heads": (128, 1),
        "n_shared_experts": (1, 1),
        "num_experts": (256, 1),
        "kv_lora_rank": (512, 1),
        "q_lora_rank": (1536, 1),
        "qk_rope_head_dim": (64, 2),
        "v_head_dim": (128, 1),
        "qk_nope_head_dim": (128, 1),
        "n_group": (8, 1),
        "topk_group": (4, 1),
        "num_experts_per_tok": (8, 1),
        "first_k_dense_replace": (3, 0),
        "max_position_embeddings": (4096, 1),
    },
}
MODEL_TYPES = tuple(_COUNTS)
_NULL_MEANS_NONE = (  # not the default
    *("q_lora_rank", "sliding_window", "n_group", "topk_group", "bos_token_id", "eos_token_id", "pad_token_id"),
)
_SCALED_ALREADY = ("default", "llama3", "longrope")  # whose max_position_embeddings is that after scaling
FLAGS = ("attention_bias", "norm_topk_prob", "rope_interleave", "tie_word_embeddings", "use_sliding_window")
# The largest counts taken: any, and those that decide how much is built before a weight is read.
_MOST = (1 << 31) - 1
_MOST_OF = {"num_hidden_layers": 1024, "head_dim": 1 << 16, "qk_rope_head_dim": 1 << 16, "num_experts": 1 << 20}


@dataclass(frozen=True, slots=True)
class Latent:
    """DeepSeek's latent attention."""

    query_rank: int | None  # None: queries are projected directly
    key_rank: int
    rope: int
    nope: int
    values: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """All that decides a model's size."""

    model_type: str
    hidden: int
    vocabulary: int
    num_layers: int  # decoder layers
    moe_layers: tuple[int, ...]  # those with routed experts
    num_experts: int
    top_k: int
    intermediate: int  # of one routed expert
    dense_intermediate: int  # of a decoder layer without experts
    shared_intermediate: int  # of all shared experts of a layer together, or 0
    num_heads: int
    num_key_value_heads: int
    head_dim: int  # of queries and keys
    latent: Latent | None
    positions: int  # tokens that a sequence may have
    ties_embeddings: bool

    @property
    def num_dense_layers_first(self) -> int:
        """Decoder layers before the first one with routed experts."""
        return self.moe_layers[0]

    def layers_for(self, num_moe_layers: int) -> int:
        """How many decoder layers, from the first, hold `num_moe_layers` MoE layers (or all, if there are fewer)."""
        return self.moe_layers[min(num_moe_layers, len(self.moe_layers)) - 1] + 1


def read_facts(config: Mapping[str, Any]) -> ModelFacts:
    """config: of a config.json, or to_dict() of a transformers config. Raises ConfigError that names the field."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _COUNTS:
        raise ConfigError(f"model_type is {model_type!r}; known are {', '.join(sorted(_COUNTS))}")
    counts = {name: _count(config, name) for name in _COUNTS[model_type]}
    heads, groups, layers = counts["num_attention_heads"], counts["num_key_value_heads"], counts["num_hidden_layers"]
    if heads % groups:
        raise ConfigError(f"num_key_value_heads is {groups}; it must divide num_attention_heads, which is {heads}")
    if counts["num_experts_per_tok"] > counts["num_experts"]:
        raise ConfigError(
            f"num_experts_per_tok is {counts['num_experts_per_tok']}, more than the {counts['num_experts']} experts"
        )
    moe_layers = _moe_layers(config, counts)
    if not moe_layers:
        raise ConfigError(f"none of the {layers} decoder layers has routed experts")
    latent, shared = None, 0
    if model_type == "deepseek_v3":
        others = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        latent = Latent(counts["q_lora_rank"] or None, *(counts[name] for name in others))
        shared, head_dim = counts["moe_intermediate_size"] * counts["n_shared_experts"], latent.nope + latent.rope
    else:
        head_dim = _head_dim(config, counts["hidden_size"], heads)
    return ModelFacts(
        model_type=model_type,
        hidden=counts["hidden_size"],
        vocabulary=counts["vocab_size"],
        num_layers=layers,
        moe_layers=moe_layers,
        num_experts=counts["num_experts"],
        top_k=counts["num_experts_per_tok"],
        intermediate=counts.get("moe_intermediate_size", counts["intermediate_size"]),
        dense_intermediate=counts["intermediate_size"],
        shared_intermediate=shared,
        num_heads=heads,
        num_key_value_heads=groups,
        head_dim=head_dim,
        latent=latent,
        positions=positions_of(counts["max_position_embeddings"], rope_of(config)),
        ties_embeddings=flag(config, "tie_word_embeddings", False),
    )


def with_defaults_for_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as transformers understands it: no field is null where transformers takes no null, flags that are null
    are false, experts are counted by its name.
    """
    known = {k: v for k, v in config.items() if v is not None or k in _NULL_MEANS_NONE}
    known |= {name: False for name in FLAGS if name in config and config[name] is None}
    if config.get("model_type") not in _COUNTS:
        return known
    if "num_key_value_heads" in config:
        known["num_key_value_heads"] = _count(config, "num_key_value_heads")
    if (experts := experts_field(config)) is not None:
        known = {k: v for k, v in known.items() if k not in _EXPERTS} | {"num_local_experts": experts}
    return known


def cut_config(config: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The same model with its first decoder layers alone."""
    cut = {**config, "num_hidden_layers": num_layers}
    if isinstance(cut.get("layer_types"), list):
        cut["layer_types"] = cut["layer_types"][:num_layers]
    return cut


def experts_field(config: Mapping[str, Any]) -> Any:
    """The number of routed experts, by whichever name is there; None if none is. Raises ConfigError if two differ."""
    found = {name: config[name] for name in _EXPERTS if config.get(name) is not None}
    if len(set(map(repr, found.values()))) > 1:
        raise ConfigError(
            f"{' and '.join(f'{name} is {value!r}' for name, value in found.items())}; they must be the same"
        )
    return next(iter(found.values()), None)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_parameters (rope_scaling in older configs), with its rope_type. Raises ConfigError if that is no object."""
    found = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"{name} is {value!r}; it must be an object or null")
        if value:
            found[name] = dict(value)
    if len(found) == 2 and any(
        found["rope_parameters"].get(key) != value for key, value in found["rope_scaling"].items()
    ):
        raise ConfigError(
            f"rope_parameters is {found['rope_parameters']} and rope_scaling {found['rope_scaling']}; give one of them"
        )
    rope = next(iter(found.values()), {})
    kinds = [rope[name] for name in ("rope_type", "type") if rope.get(name) is not None]
    for kind in kinds:
        if not isinstance(kind, str):
            raise ConfigError(f"rope_type is {kind!r}; it must be a name")
    if len(set(kinds)) > 1:
        raise ConfigError(f"rope_type is {rope['rope_type']!r}, but type is {rope['type']!r}; give one of them")
    return rope | {"rope_type": kinds[0] if kinds else "default"}


def positions_of(most: int, rope: Mapping[str, Any]) -> int:
    """How many tokens a sequence may have.

    Configs with scaled rotary embeddings may give max_position_embeddings as it was before scaling (Qwen3's yarn) or
    after (DeepSeek-V3's); the larger holds.
    """
    if rope.get("rope_type", "default") in _SCALED_ALREADY:
        return most
    return max(most, int(number(rope, "original_max_position_embeddings", most, 1) * number(rope, "factor", 1, 0)))


def number(fields: Mapping[str, Any], name: str, default: float, least: float) -> float:
    """A finite number of at least `least`. Raises ConfigError."""
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value < 1e18:
        raise ConfigError(f"{name} is {value!r}; it must be a number, at least {least:g}")
    return value


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """true or false; `default` where it is missing, false where it is null, as `if` takes it. Raises ConfigError."""
    value = config.get(name, default)
    if value is None:
        return False
    if type(value) is not bool:
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    return value


def whole(name: str, value: Any, least: int) -> int:
    """`value`, a whole number from `least` to the most that a model may have. Raises ConfigError for anything else."""
    most = _MOST_OF.get(name, _MOST)
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number, at least {least} and at most {most}")
    return value


def refuse_null(config: Mapping[str, Any], name: str, instead: str) -> None:
    """Raises ConfigError where a field is there, but null, and transformers takes no null. instead: what to give."""
    if name in config and config[name] is None:
        raise ConfigError(f"{name} is null, which transformers does not take there; {instead}, or leave it out")


def _count(config: Mapping[str, Any], name: str) -> int:
    """0 only where a null means none."""
    default, least = _COUNTS[config["model_type"]][name]
    value = experts_field(config) if name == "num_experts" else config.get(name)
    names = _EXPERTS if name == "num_experts" else () if name in (*_NULL_MEANS_NONE, "num_key_value_heads") else (name,)
    for one in names if value is None else ():
        refuse_null(config, one, f"give a whole number (the default is {default})")
    if value is None and name in config and name == "num_key_value_heads":
        return _count(config, "num_attention_heads")  # as transformers has it: every head its own
    if value is None and name in config and name in _NULL_MEANS_NONE:
        if name != "q_lora_rank":
            raise ConfigError(f"{name} is null; say 1 where experts are not in groups")
        return 0
    return default if value is None else whole(name, value, least)


def _moe_layers(config: Mapping[str, Any], counts: Mapping[str, Any]) -> tuple[int, ...]:
    layers = range(counts["num_hidden_layers"])
    if "first_k_dense_replace" in counts:
        return tuple(layers[counts["first_k_dense_replace"] :])
    if "decoder_sparse_step" not in counts:
        return tuple(layers)
    dense = config.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, (list, tuple)):
        raise ConfigError(f"mlp_only_layers is {dense!r}; it must be a list of layers' numbers")
    dense = {whole("mlp_only_layers", layer, 0) for layer in dense}
    return tuple(layer for layer in layers if layer not in dense and (layer + 1) % counts["decoder_sparse_step"] == 0)


def _head_dim(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = whole("head_dim", config["head_dim"], 2)
    elif hidden % heads:
        raise ConfigError(
            f"hidden_size is {hidden}, which the {heads} num_attention_heads do not divide; give head_dim"
        )
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise ConfigError(f"head_dim is {head_dim}; rotary embeddings turn pairs, so it must be even")
    return head_dim
