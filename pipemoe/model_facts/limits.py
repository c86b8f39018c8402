"""What a config may ask for that is not implemented for its family. It is refused by name, so that no model silently
computes something else.

The reference is the family's module in transformers: whatever that does with a config is done here, or refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipemoe.errors import ConfigError
from pipemoe.model_facts.facts import (
    FLAGS,
    Latent,
    ModelFacts,
    experts_field,
    flag,
    number,
    read_facts,
    refuse_null,
    rope_of,
    whole,
)

FP8_BLOCK = [128, 128]
_log = logging.getLogger("pipemoe")
_ACTIVATIONS = ("silu", "swish")
_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
}
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")  # these rescale by the longest sequence seen

# For every family: fields, and their values that are done here. A field that is missing or null is done too.
_ANY: dict[str, tuple[Any, ...]] = {
    "hidden_act": _ACTIVATIONS,
    "mlp_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "partial_rotary_factor": (1.0,),
    "use_cla": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "attention_multiplier": (1.0,),
    "dual_chunk_attention_config": (),
    "index_topk": (),
    "compression_config": (),
    "sparse_attention_config": (),
    "ep_size": (1,),
    "tp_size": (1,),
}
_PER_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen3_moe": {
        "scoring_func": ("softmax",),
        "n_shared_experts": (0,),
        "shared_expert_intermediate_size": (0,),
        "qkv_bias": (False,),
        "use_qk_norm": (True,),
        "qk_norm": (True,),
        "moe_layer_freq": (1,),
        "first_k_dense_replace": (0,),
        "n_group": (1,),
        "topk_group": (1,),
        "routed_scaling_factor": (1.0,),
    },
    "mixtral": {
        "scoring_func": ("softmax",),
        "norm_topk_prob": (True,),
        "attention_bias": (False,),
        "qkv_bias": (False,),
        "use_qk_norm": (False,),
        "qk_norm": (False,),
        "n_shared_experts": (0,),
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
        "moe_layer_freq": (1,),
        "first_k_dense_replace": (0,),
        "n_group": (1,),
        "topk_group": (1,),
        "routed_scaling_factor": (1.0,),
    },
    "deepseek_v3": {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
        "sliding_window": (),
        "use_sliding_window": (False,),
        "qkv_bias": (False,),
        "use_qk_norm": (False,),
        "use_mla": (True,),
    },
}
# Fields that change nothing in a forward pass, or are read elsewhere.
_HARMLESS = frozenset(
    "model_type architectures auto_map torch_dtype dtype transformers_version _name_or_path name_or_path use_cache "
    "initializer_range "
    "attention_dropout attn_dropout output_router_logits router_aux_loss_coef router_jitter_noise aux_loss_alpha "
    "seq_aux pretraining_tp "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id chunk_size_feed_forward id2label "
    "label2id problem_type "
    "return_dict output_attentions output_hidden_states num_nextn_predict_layers num_mtp_layers is_decoder "
    "task_specific_params finetuning_task "
    "cross_attention_hidden_size tokenizer_class prefix torchscript pruned_heads quantization_config "
    "max_window_layers layer_types qk_head_dim "
    "rms_norm_eps rope_theta rope_parameters rope_scaling rope_interleave norm_topk_prob routed_scaling_factor "
    "sliding_window use_sliding_window "
    "mlp_only_layers attention_bias tie_word_embeddings head_dim hidden_size intermediate_size "
    "moe_intermediate_size num_hidden_layers "
    "num_attention_heads num_key_value_heads max_position_embeddings vocab_size num_experts num_local_experts "
    "n_routed_experts "
    "num_experts_per_tok decoder_sparse_step first_k_dense_replace n_group topk_group n_shared_experts kv_lora_rank "
    "q_lora_rank "
    "qk_rope_head_dim qk_nope_head_dim v_head_dim _attn_implementation attn_implementation unsloth_version "
    "unsloth_fixed".split()
)


def supported_facts(config: Mapping[str, Any]) -> ModelFacts:
    """read_facts, if everything the config asks for is implemented. Else raises ConfigError that names the field."""
    facts = read_facts(config)
    check_common(config)
    model_type = facts.model_type
    for name, done in _PER_FAMILY[model_type].items():
        _check(config, name, done, f"{model_type} models")
    for name, least in (("rms_norm_eps", 0), ("rope_theta", 1e-9), ("routed_scaling_factor", 0)):
        number(config, name, 1.0, least)
    for name in FLAGS:
        flag(config, name, False)
    for name in ("hidden_act", "rms_norm_eps", "rope_theta"):
        refuse_null(config, name, "give a value")
    if facts.latent is not None:
        refuse_null(config, "routed_scaling_factor", "give a number")
        _check_deepseek(config, facts, facts.latent)
    else:
        _check_windows(config)
    unknown = sorted(
        name
        for name, value in config.items()
        if value and name not in _HARMLESS | _ANY.keys() | _PER_FAMILY[model_type].keys()
    )
    if unknown:
        _log.info("the config's fields %s are not known to pipemoe and have no effect", ", ".join(unknown))
    return facts


def check_common(config: Mapping[str, Any]) -> None:
    """Checks what holds for every family. Raises ConfigError."""
    for name, done in _ANY.items():
        _check(config, name, done, "the experts" if name == "hidden_act" else "models here")
    check_quantisation(config.get("quantization_config"))
    _check_rope(config)


def _check(config: Mapping[str, Any], name: str, done: tuple[Any, ...], whose: str) -> None:
    value = config.get(name)
    if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in done):
        return
    wanted = f"only {' or '.join(map(repr, done))} is done" if done else "it is not done"
    raise ConfigError(f"{name} is {value!r}; by {whose} {wanted}")


def check_quantisation(quantisation: Any) -> None:
    if quantisation is None:
        return
    known = quantisation if isinstance(quantisation, Mapping) else getattr(quantisation, "to_dict", dict)()
    method, block = known.get("quant_method"), known.get("weight_block_size")
    if method == "mxfp4":
        return
    if method != "fp8" or not isinstance(block, (list, tuple)) or list(block) != FP8_BLOCK:
        raise ConfigError(
            f"the checkpoint is quantised (quantization_config: quant_method {method!r}, weight_block_size "
            f"{block}); pipemoe "
            f"reads unquantised weights and fp8 ones in blocks of {FP8_BLOCK[0]} x {FP8_BLOCK[1]}, convert it to "
            "bfloat16 first"
        )
    for name, done in (("activation_scheme", ("dynamic",)), ("fmt", ("e4m3",))):
        if known.get(name) is not None and known[name] not in done:
            raise ConfigError(
                f"quantization_config: {name} is {known[name]!r}; only {done[0]!r} is done, convert the checkpoint "
                "to bfloat16 first"
            )


def _check_rope(config: Mapping[str, Any]) -> None:
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind in _BATCH_DEPENDENT_ROPE:
        raise ConfigError(f"rope_type is {kind!r}, which depends on batch neighbours; it is not supported")
    if kind not in _ROPE_FIELDS:
        raise ConfigError(f"rope_type is {kind!r}; {', '.join(_ROPE_FIELDS)} are done")
    usual = ("rope_type", "type", "rope_theta")
    for name, value in rope.items():
        if name == "partial_rotary_factor":
            _check(rope, name, (1.0,), "models here")
        elif value is not None and name not in usual and name not in _ROPE_FIELDS[kind]:
            if kind == "default" and name == "factor" and value == 1:
                continue
            raise ConfigError(f"rope_parameters: {name} is {value!r}, which rope_type {kind!r} does not have")
    number(rope, "rope_theta", 1.0, 1e-9)
    refuse_null(rope, "rope_theta", "give a number")
    for name in (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ):
        number(rope, name, 1.0, 0)
    if kind in ("linear", "yarn", "llama3") and number(rope, "factor", 0.0, 0) < 1:
        raise ConfigError(
            f"rope_parameters: factor is {rope.get('factor')!r}; rope_type {kind!r} needs one, at least 1"
        )
    if rope.get("original_max_position_embeddings") is not None:
        whole("original_max_position_embeddings", rope["original_max_position_embeddings"], 1)


def _check_deepseek(config: Mapping[str, Any], facts: ModelFacts, latent: Latent) -> None:
    if facts.num_key_value_heads != facts.num_heads:
        raise ConfigError(
            f"num_key_value_heads is {facts.num_key_value_heads} (null: as many as heads); latent attention has one "
            f"for each of the {facts.num_heads} heads"
        )
    if config.get("head_dim") not in (None, latent.rope):
        raise ConfigError(
            f"head_dim is {config['head_dim']!r}; in deepseek_v3 it is qk_rope_head_dim, which is {latent.rope}"
        )
    if latent.rope % 2:
        raise ConfigError(f"qk_rope_head_dim is {latent.rope}; rotary embeddings turn pairs, so it must be even")
    experts = experts_field(config) or facts.num_experts
    groups, chosen = config.get("n_group", 8), config.get("topk_group", 4)
    if experts % groups or experts // groups < 2:
        raise ConfigError(f"n_group is {groups}; it must divide the {experts} experts into groups of at least two")
    if chosen > groups or chosen * (experts // groups) < facts.top_k:
        raise ConfigError(
            f"topk_group is {chosen}; it must be at most n_group, {groups}, and so many groups must hold "
            f"{facts.top_k} experts"
        )


def _check_windows(config: Mapping[str, Any]) -> None:
    window = config.get("sliding_window")
    if config["model_type"] == "qwen3_moe" and not config.get("use_sliding_window"):
        window = None
    if window is not None:
        whole("sliding_window", window, 1)
        if config.get("max_window_layers"):
            raise ConfigError(
                f"max_window_layers is {config['max_window_layers']!r}; a sliding window of some layers alone is "
                "not done"
            )
    kinds = config.get("layer_types")
    wanted = "full_attention" if window is None else "sliding_attention"
    if kinds is not None and (not isinstance(kinds, (list, tuple)) or any(kind != wanted for kind in kinds)):
        raise ConfigError(f"layer_types is {kinds!r}; with sliding_window {window} all layers here are {wanted!r}")
