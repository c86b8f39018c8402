"""A tiny config of every causal LM with routed experts that transformers ships."""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 131
# Fields that most families have; each gets those that its config knows.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_topk": 3,
    "moe_k": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
# Two layers with state, one with attention.
_MIXED: dict[str, Any] = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
_GATED_DELTA: dict[str, Any] = _MIXED | {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
_OWN: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 3},
    },
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 6},
    "deepseek_v4": {"swiglu_limit": 0.25},
    "dots1": {"n_shared_experts": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "top_k_experts": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 16,
        "per_layer_config": {},
    },
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 6},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8},
    "granitemoehybrid": _MIXED | _MAMBA | {"shared_intermediate_size": 40},
    "hy_v4": {"swiglu_limit": 0.25},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
    | {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "kimi_linear": _MIXED
    | {"num_experts_per_token": 3, "linear_head_dim": 16, "linear_num_heads": 4}
    | {"num_key_value_heads": 4, "head_dim": 24, "q_lora_rank": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 96, "attention_chunk_size": 8},
    "longcat_flash": _MLA | {"expert_ffn_hidden_size": 32, "zero_expert_num": 4, "ffn_hidden_size": 96, "head_dim": 8},
    "minimax_m3_vl_text": {"swiglu_limit": 0.5},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 40,
        "use_mamba_kernels": False,
    },
    "qwen3_5_moe_text": _GATED_DELTA,
    "qwen3_next": _GATED_DELTA,
    "qwen4_exp_text": _GATED_DELTA
    | {"hc_lowrank": 16, "ple_embed_dim": 16, "ngram_vocab_size_base": 200}
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4}
    | {"indexer_compress_ratio": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}

FAMILIES = tuple(
    "afmoe aria_text axk1 axk2 cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 dots1 ernie4_5_moe "
    "exaone_moe flex_olmo gemma4_text glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoe_swa "
    "granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling_text jamba jetmoe kimi_linear laguna "
    "lfm2_moe llama4_text longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h "
    "olmoe phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text solar_open zaya".split()
)
# Clamped experts with biases; linear attention, and experts in the usual form.
FEW_ON_GPUS = ("gpt_oss", "qwen3_next")


def is_left_out(world: Any, family: str) -> bool:
    """In tests that take seconds for each family: all of them on two ranks of a host, a few on GPUs."""
    return family not in FEW_ON_GPUS if world.device.type == "cuda" else world.size != 2


def tiny_family_config(model_type: str, **changes: Any) -> Any:
    """A transformers config of a few layers, at least two of them with routed experts."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    known = config_class().to_dict()
    fields = {name: value for name, value in _COMMON.items() if name in known or name.endswith("_token_id")}
    return config_class(**fields | _OWN.get(model_type, {}) | changes)


def make_model(family: str, device: Any = "cpu", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same transformers model of a tiny config wherever this is called."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_family_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some begin with zeros, which would hide what is wrong
            if not parameter.any():
                parameter.normal_(0, 0.1)
    return model.to(device, dtype)
