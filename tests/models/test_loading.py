"""Configs in, decoders out: what is accepted, what is refused, and the fingerprint."""

from __future__ import annotations

import json

import pytest
import torch

from pipemoe.errors import CheckpointError, ConfigError
from pipemoe.models.config import num_positions, read_config
from pipemoe.models.loading import load_decoder
from pipemoe.plan.schedule import ModelShape
from tests.models.tiny import FAMILIES, tiny_config


def load(source, rank=0, num_ranks=2, dtype=torch.float32, seed=0, random_weights=False):
    return load_decoder(
        source, rank=rank, num_ranks=num_ranks, device="cpu", dtype=dtype, seed=seed, random_weights=random_weights
    )


@pytest.mark.parametrize(
    "family, shape",
    [
        ("qwen3_moe", ModelShape(hidden=64, intermediate=48, num_experts=8, top_k=3, num_layers=3)),
        ("mixtral", ModelShape(hidden=64, intermediate=48, num_experts=8, top_k=2, num_layers=3)),
        ("deepseek_v3", ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=3, num_layers=2)),
    ],
)
def test_shape(family, shape):
    decoder, weights = load(tiny_config(family))
    assert decoder.shape == shape and decoder.family == family
    assert len(weights) == shape.num_layers
    assert weights[0].gate_up.shape == (4, 2 * shape.intermediate, shape.hidden)


def test_random_weights_for_an_object_and_where_asked_for(tmp_path):
    config = tiny_config("qwen3_moe")
    raw = json.loads(config.to_json_string(use_diff=False))
    for name in ("my_model.json", "config.json"):
        (tmp_path / name).write_text(json.dumps(raw))
    sources = raw, tmp_path / "my_model.json", str(tmp_path / "config.json"), tmp_path, str(tmp_path)
    fingerprints = {load(source, random_weights=True)[0].fingerprint for source in (config, *sources)}
    assert fingerprints == {load(config)[0].fingerprint}


def test_random_weights_are_never_a_surprise(tmp_path):
    """A dict, the path of a config.json, or a file of any other name, once gave a model of random weights without a
    word.
    """
    raw = json.loads(tiny_config("qwen3_moe").to_json_string(use_diff=False))
    for name in ("config.json", "config"):
        (tmp_path / name).write_text(json.dumps(raw))
    for source, what in (
        (raw, "a dict"),
        (tmp_path / "config.json", "config.json is a file"),
        (str(tmp_path / "config"), "config is a file"),
    ):
        with pytest.raises(
            CheckpointError,
            match=f"^rank 1: .*{what}.* has no weights: give a checkpoint directory, or random_weights=True",
        ):
            load(source, rank=1)
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        load(tmp_path)
    for source in (None, 7, ["a"]):
        with pytest.raises(
            CheckpointError, match="cannot be loaded from a (NoneType|int|list); give a checkpoint directory"
        ):
            load(source)
    with pytest.raises(ConfigError, match="random_weights is 'yes'"):
        load(raw, random_weights="yes")


def test_loading_leaves_the_callers_config_alone():
    config = tiny_config("mixtral")
    before = config.to_dict()
    load(config)
    assert config.to_dict() == before and config._attn_implementation != "pipemoe_packed"


def test_configs_in_the_older_style_are_understood():
    raw = dict(
        model_type="deepseek_v3", rope_theta=1234.0, rope_scaling=dict(type="yarn", factor=4.0, mscale_all_dim=1.0)
    )
    config, directory = read_config(raw, random_weights=True)
    assert directory is None
    assert config.rope_parameters["rope_theta"] == 1234.0 and config.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 512),
        # as in Qwen3's instructions
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        # as in DeepSeek-V3's config
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "linear", "factor": 2.0}, 1024),
    ],
)
def test_scaled_rotary_embeddings_have_more_positions(rope, positions):
    assert num_positions(tiny_config("qwen3_moe", rope_parameters={"rope_theta": 1e4, **rope})) == positions


def test_fingerprint_differs_with_config_seed_and_dtype():
    config = tiny_config("mixtral")
    prints = [
        load(config)[0].fingerprint,
        load(config, rank=1)[0].fingerprint,
        load(config, seed=1)[0].fingerprint,
        load(config, dtype=torch.bfloat16)[0].fingerprint,
        load(tiny_config("mixtral", rms_norm_eps=1e-3))[0].fingerprint,
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="llama"), r"no routed experts were found in a LlamaForCausalLM: looked for gate_up_proj"),
        (dict(model_type=None), "model_type is None"),
        (dict(quantization_config=dict(quant_method="fp8")), "quantised.*'fp8'.*bfloat16"),
        (
            dict(quantization_config=dict(quant_method="gptq", weight_block_size=[128, 128])),
            "quantised.*'gptq'.*bfloat16",
        ),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(mlp_only_layers=[0, 1, 2]), "none of the 3 decoder layers"),
        (dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), "rope_type is 'dynamic'"),
        (dict(hidden_size="many"), "hidden_size is 'many'; it must be a whole number"),
    ],
)
def test_a_config_that_cannot_work_names_rank_and_reason(changes, message):
    raw = json.loads(tiny_config("qwen3_moe").to_json_string(use_diff=False)) | changes
    with pytest.raises(CheckpointError, match=f"^rank 1: (.*){message}"):
        load(raw, rank=1, random_weights=True)


def test_no_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"^rank 0: cannot read .*config.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"^rank 0: cannot read"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        load(tmp_path)


def test_bad_dtype():
    with pytest.raises(ConfigError, match="rank 0: dtype is torch.int8"):
        load(tiny_config("mixtral"), dtype=torch.int8)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_on_the_meta_device(family):
    decoder, _ = load(tiny_config(family))
    tensors = [*decoder._model.parameters(), *decoder._model.buffers(), *decoder._lm_head.parameters()]
    assert not any(t.is_meta or t.requires_grad for t in tensors)
