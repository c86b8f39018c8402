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
    assert torch.equal(
        weights[1].gate_up_scales[1, 1:], stored["model.layers.2.mlp.experts.5.up_proj.weight_scale_inv"]
    )


def test_others_are_quantised_while_loading(directories):
    (_, weights), (_, wide) = load(directories[1], quantised=True), load(directories[1])
    for layer_weights, unquantised in zip(weights, wide, strict=True):
        wanted = quantise_experts(unquantised)
        assert torch.equal(layer_weights.gate_up.view(torch.uint8), wanted.gate_up.view(torch.uint8))
        assert torch.equal(layer_weights.down_scales, wanted.down_scales)
    _, random = load(tiny_config("deepseek_v3", hidden_size=256, moe_intermediate_size=128), quantised=True)
    assert all(layer_weights.is_quantised for layer_weights in random)


@pytest.mark.parametrize("part", ["mlp.experts.6.down_proj", "self_attn.o_proj"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scales: None, " is stored as F8_E4M3, and {name}_scale_inv is missing"),
        (lambda scales: scales[:1].clone(), r"_scale_inv has shape \(1, \d\) .* wanted, shape \(2, \d\)"),
        (lambda scales: scales[None].clone(), r"_scale_inv has shape \(1, 2, \d\)"),
        (lambda scales: scales.reshape(-1)[0].clone(), r"_scale_inv has shape \(\)"),
        (lambda scales: scales.to(torch.int8), "_scale_inv has shape .* and is stored as I8"),
    ],
    ids=["missing", "short", "three_axes", "one", "whole_numbers"],
)
def test_scales_that_do_not_fit(directories, tmp_path, part, change, message):
    stored = load_file(directories[0] / SHARD)
    name = f"model.layers.1.{part}.weight"
    scales = change(stored.pop(f"{name}_scale_inv"))
    if scales is not None:
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, tmp_path / SHARD, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directories[0] / "config.json").read_text())
    for quantised in (False, True):
        with pytest.raises(CheckpointError, match=f"^rank 1: .*{name}{message.format(name=name)}"):
            load(tmp_path, quantised=quantised)


def test_experts_of_which_only_some_are_quantised(directories, tmp_path):
    """The first expert's names once stood for all of them: another's wide weights were then taken for scaled ones."""
    stored, name = load_file(directories[0] / SHARD), "model.layers.1.mlp.experts.6.down_proj.weight"
    stored[name] = dequantise_weight(stored[name], stored.pop(f"{name}_scale_inv"), torch.float32)
    save_file(stored, tmp_path / SHARD, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directories[0] / "config.json").read_text())
    mixed, wanted = load(tmp_path, quantised=True)[1][0], load(directories[0], quantised=True)[1][0]
    assert mixed.is_quantised
    for field in ("gate_up", "down"):
        a, b = (getattr(dequantise_experts(weights, torch.float32), field) for weights in (mixed, wanted))
        assert torch.allclose(a, b, rtol=0.1, atol=1e-3)


def test_experts_that_end_within_a_block(tmp_path):
    """Gate and up have scales of their own, the two together have fewer: they are made anew."""
    wide = tmp_path / "wide"
    config = tiny_config("deepseek_v3", num_layers=2, hidden_size=256, moe_intermediate_size=48)
    reference_model(config, "cpu", torch.float32, seed=3).save_pretrained(wide, save_original_format=True)
    stored = load_file(wide / SHARD)
    for name in [name for name in stored if "mlp.experts." in name]:
        stored[name], stored[f"{name}_scale_inv"] = quantise_weight(stored[name])
    save_file(stored, tmp_path / SHARD, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((wide / "config.json").read_text())
    found, wanted = (
        dequantise_experts(load(folder, quantised=True)[1][0], torch.float32) for folder in (tmp_path, wide)
    )
    assert torch.allclose(found.gate_up, wanted.gate_up, rtol=0.15, atol=1e-3)


def test_scales_that_are_not_finite(directories, tmp_path):
    stored = load_file(directories[0] / SHARD)
    stored["model.layers.1.mlp.experts.6.down_proj.weight_scale_inv"][0, 0] = float("nan")
    save_file(stored, tmp_path / SHARD, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((directories[0] / "config.json").read_text())
    for quantised in (False, True):
        with pytest.raises(CheckpointError, match="^rank 1: .*NaN"):
            load(tmp_path, quantised=quantised)


@pytest.mark.parametrize(
    ("field", "value"), [("activation_scheme", "static"), ("fmt", "e5m2"), ("weight_block_size", [64, 64])]
)
def test_other_ways_of_fp8_are_refused_by_name(directories, tmp_path, field, value):
    config = json.loads((directories[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": FORMAT | {field: value}}))
    with pytest.raises(CheckpointError, match=f"^rank 1: .*quantization_config: .*{field}.*bfloat16 first"):
        load(tmp_path)
