"""What a config may ask for and the families do: the same logits as transformers' whole model."""

from __future__ import annotations

import pytest
import torch

from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import reference_model
from tests.models.test_decoder import assert_same_as_reference, packed, sequences_of
from tests.models.tiny import FAMILIES, run_microbatches, tiny_config

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS = [(family, {"rope_parameters": rope}) for family in FAMILIES for rope in (LINEAR, YARN, LLAMA3)] + [
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_layers": 4}),
    ("qwen3_moe", {"mlp_only_layers": [0, 3], "num_layers": 4}),
    ("qwen3_moe", {"hidden_act": "swish", "num_key_value_heads": 1}),
    ("qwen3_moe", {"head_dim": 24}),
    ("mixtral", {"sliding_window": 5}),
    ("mixtral", {"router_jitter_noise": 0.5, "head_dim": 8}),
    ("deepseek_v3", {"attention_bias": True}),
    ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 0.7}),
    ("deepseek_v3", {"rope_interleave": False}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
    ("deepseek_v3", {"first_k_dense_replace": 0}),
    ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16}}),
]


@pytest.mark.parametrize(
    ("family", "changes"), VARIANTS, ids=lambda value: str(value)[:60] if isinstance(value, dict) else value
)
def test_the_same_logits_as_the_whole_model(family, changes):
    config = tiny_config(family, **({"num_layers": 2} | changes))
    decoder, weights = load_decoder(config, rank=0, num_ranks=1, device="cpu", dtype=torch.float32)
    sequences = sequences_of([21, 4])
    logits = run_microbatches(
        decoder, [weights], [packed(sequences, [(0, 0, 9), (1, 0, 4)]), packed(sequences, [(0, 9, 21)])]
    )
    config.head_dim = decoder.config.to_dict().get("head_dim", 16)  # transformers' yarn does not take None
    assert_same_as_reference(reference_model(config, "cpu", torch.float32), sequences, logits)


@pytest.mark.parametrize("name", ["rope_interleave", "norm_topk_prob"])
def test_null_flags_are_false_as_in_transformers(name):
    from transformers import CONFIG_MAPPING

    raw = tiny_config("deepseek_v3", num_layers=2).to_dict() | {name: None}
    decoder, weights = load_decoder(raw, rank=0, num_ranks=1, device="cpu", dtype=torch.float32, random_weights=True)
    sequences = sequences_of([21])
    logits = run_microbatches(decoder, [weights], [packed(sequences, [(0, 0, 21)])])
    theirs = CONFIG_MAPPING["deepseek_v3"].from_dict({k: v for k, v in raw.items() if k != "model_type"})
    assert getattr(theirs, name) is None
    assert_same_as_reference(reference_model(theirs, "cpu", torch.float32), sequences, logits)
