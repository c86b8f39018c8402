"""Checkpoints as DeepSeek-V3 publishes them: e4m3 matrices beside their scales, widened or taken as they are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipemoe.e4m3 import dequantise_weight, quantise_weight
from pipemoe.errors import CheckpointError
from pipemoe.experts import dequantise_experts, quantise_experts
from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import reference_model
from tests.models.tiny import tiny_config

SHARD = "model.safetensors"
FORMAT = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
QUANTISED = ("self_attn.kv_a_proj_with_mqa", "mlp.experts.", "mlp.shared_experts.", "self_attn.o_proj")


def load(directory, **settings):
    return load_decoder(directory, rank=1, num_ranks=2, device="cpu", dtype=torch.float32, **settings)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The same numbers twice: as e4m3 with scales, and widened."""
    config = tiny_config("deepseek_v3", hidden_size=256, moe_intermediate_size=128)
    narrow, wide = tmp_path_factory.mktemp("narrow"), tmp_path_factory.mktemp("wide")
    reference_model(config, "cpu", torch.bfloat16, seed=3).save_pretrained(wide, save_original_format=True)
    tensors, stored = load_file(wide / SHARD), {}
    for name, tensor in list(tensors.items()):
        stored[name] = tensor
        if any(part in name for part in QUANTISED):
            stored[name], stored[f"{name}_scale_inv"] = quantise_weight(tensor)
            tensors[name] = dequantise_weight(stored[name], stored[f"{name}_scale_inv"], torch.float32)
    save_file(stored, narrow / SHARD, metadata={"format": "pt"})
    save_file(tensors, wide / SHARD, metadata={"format": "pt"})
    raw = json.loads((wide / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(raw | {"quantization_config": FORMAT}))
    return narrow, wide


def test_widened_they_are_the_same_numbers(directories):
    (narrow, narrow_weights), (wide, wide_weights) = (load(directory) for directory in directories)
    found = narrow._model.state_dict()
    for name, tensor in wide._model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    for a, b in zip(narrow_weights, wide_weights, strict=True):
        assert torch.equal(a.gate_up, b.gate_up) and torch.equal(a.down, b.down) and not a.is_quantised


def test_experts_are_taken_as_they_are(directories):
    stored = load_file(directories[0] / SHARD)
    _, weights = load(directories[0], quantised=True)
    _, widened = load(directories[0])
    assert len(weights) == 2
    for layer, (layer_weights, wide) in enumerate(zip(weights, widened, strict=True)):
        layer_weights.validate(layer)
        assert layer_weights.is_quantised and layer_weights.first_expert == 4
        again = dequantise_experts(layer_weights, torch.float32)
        assert torch.equal(again.gate_up, wide.gate_up) and torch.equal(again.down, wide.down)
    up = stored["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert torch.equal(weights[1].gate_up[1, 128:].view(torch.uint8), up.view(torch.uint8))
    assert torch.equal(weights[1].gate_up_scales[1, 1:], stored["model.layers.2.mlp.experts.5.up_proj.weight_scale_inv"])


def test_others_are_quantised_while_loading(directories):
    (_, weights), (_, wide) = load(directories[1], quantised=True), load(directories[1])
    for layer_weights, unquantised in zip(weights, wide, strict=True):
        wanted = quantise_experts(unquantised)
        assert torch.equal(layer_weights.gate_up.view(torch.uint8), wanted.gate_up.view(torch.uint8))
        assert torch.equal(layer_weights.down_scales, wanted.down_scales)
    _, random = load(tiny_config("deepseek_v3", hidden_size=256, moe_intermediate_size=128), quantised=True)
    assert all(layer_weights.is_quantised for layer_weights in random)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_scales_that_do_not_fit(directories, tmp_path, change):
    stored = load_file(directories[0] / SHARD)
    name = "model.layers.1.mlp.experts.6.down_proj.weight"
    scales = stored.pop(f"{name}_scale_inv")
    if change == "shape":
        stored[f"{name}_scale_inv"] = scales[:1].clone()
    save_file(stored, tmp_path / SHARD, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directories[0] / "config.json").read_text())
    message = "is stored as F8_E4M3" if change == "missing" else "_scale_inv has shape"
    for quantised in (False, True):
        with pytest.raises(CheckpointError, match=f"^rank 1: .*{name}.*{message}" if change == "missing" else f"{name}{message}"):
            load(tmp_path, quantised=quantised)
