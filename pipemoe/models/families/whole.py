"""The families that no file here states: any causal LM with routed experts that transformers ships.

transformers' own forward runs for them, so its reading of a config is what counts. A field that it does not read, but
that changes a forward by its name, is refused: transformers would ignore it silently.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any

from pipemoe.errors import CheckpointError, ConfigError
from pipemoe.model_facts.limits import check_quantisation

_log = logging.getLogger("pipemoe")
# Other names of a family's tensors and config.
ALIASES = {"kimi_k2": "deepseek_v3"}
# Fields that change a forward, and their values that change nothing where a family does not have them.
_TELLING: dict[str, tuple[Any, ...]] = {
    "scoring_func": (),  # see _scoring_of
    "topk_method": ("noaux_tc", "greedy"),
    "moe_layer_freq": (1,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
    "first_k_dense_replace": (0,),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1.0,),
    "n_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
    "qkv_bias": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (1.0,),
    "swiglu_limit": (),
    "attention_sinks": (False,),
    "hidden_act": ("silu",),
}


def is_whole(model_type: Any) -> bool:
    """Has transformers a causal LM of this model_type, whose own config it is?"""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not (isinstance(model_type, str) and model_type in known and model_type in CONFIG_MAPPING):
        return False
    return "text_config" not in CONFIG_MAPPING[model_type].sub_configs  # of several models, pictures and text


def whole_config(raw: Mapping[str, Any], where: str) -> Any:
    """The transformers config of a config.json. Raises CheckpointError that names the field."""
    from transformers import CONFIG_MAPPING

    left_out = ("model_type", "quantization_config")
    fields = {name: _with_floats(value) for name, value in raw.items() if name not in left_out}
    try:
        check_quantisation(raw.get("quantization_config"))
        config = CONFIG_MAPPING[raw["model_type"]].from_dict(fields)
    except ConfigError as error:
        raise CheckpointError(f"{where}{error}") from None
    except Exception as error:  # transformers validates by many exception types
        raise CheckpointError(f"{where}is not a valid {raw['model_type']} config: {error}") from error
    check_ignored_fields(raw, config, where)
    return config


def _with_floats(value: Any) -> Any:
    """transformers writes what JSON has no number for as an object."""
    if isinstance(value, dict):
        return (
            float(value["__float__"]) if set(value) == {"__float__"} else {k: _with_floats(v) for k, v in value.items()}
        )
    return [_with_floats(item) for item in value] if isinstance(value, list) else value


def check_ignored_fields(raw: Mapping[str, Any], config: Any, where: str) -> None:
    """Raise CheckpointError for a field that changes a forward by its name, but that transformers does not read."""
    texts = _sources(config)
    if texts is None:
        return
    unread, usual = [], type(config)().to_dict()
    for name, value in raw.items():
        if (
            not value
            or (name in usual and usual[name] == value)
            or name in type(config).attribute_map
            or f".{name}" in texts
            or f'"{name}"' in texts
        ):
            continue
        done = _TELLING.get(name)
        if name == "scoring_func":
            done = ("sigmoid" if "sigmoid(" in texts else "softmax",)
        if name == "swiglu_limit":  # GPT-OSS's experts have theirs as a constant
            done = tuple(float(limit) for limit in re.findall(r"self\.limit = ([\d.]+)", texts))
        if done is not None and not any(value == one for one in done):
            raise CheckpointError(
                f"{where}{name} is {value!r}, which transformers does not read in {config.model_type} models; "
                + (f"they do as if it were {' or '.join(map(repr, done))}" if done else "they have nothing like it")
            )
        if done is None and f"{name}:" not in texts:
            unread.append(name)
    if unread:
        _log.info("transformers reads %s of the config nowhere in %s models", ", ".join(unread), config.model_type)


def _sources(config: Any) -> str | None:
    """The text of the family's modules in transformers, if it can be had."""
    from transformers import AutoModelForCausalLM

    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        modules = [sys.modules[model_class.__module__], sys.modules[type(config).__module__]]
        return "\n".join(inspect.getsource(module) for module in modules)
    except (KeyError, OSError):
        return None
