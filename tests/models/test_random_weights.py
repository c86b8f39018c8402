"""Random weights: functions of names alone."""

from __future__ import annotations

import torch

from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import random_experts, random_parameter, reference_model
from tests.models.tiny import tiny_config

CPU = torch.device("cpu")
SHAPE = dict(hidden=16, intermediate=8, device=CPU, dtype=torch.float32)


def test_an_expert_is_the_same_on_whatever_rank():
    everything = random_experts(2, range(10), seed=5, **SHAPE)
    part = random_experts(2, range(3, 6), seed=5, **SHAPE)
    assert part.first_expert == 3
    assert torch.equal(part.gate_up, everything.gate_up[3:6]) and torch.equal(part.down, everything.down[3:6])


def test_seed_layer_and_expert_all_matter():
    made = [
        random_experts(layer, range(expert, expert + 1), seed=seed, **SHAPE).gate_up
        for layer, expert, seed in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(made) for b in made[:i])


def test_dtypes_agree_up_to_rounding():
    shape = torch.Size([7, 5])
    fine = random_parameter("a.weight", shape, seed=1, device=CPU, dtype=torch.float32)
    coarse = random_parameter("a.weight", shape, seed=1, device=CPU, dtype=torch.bfloat16)
    assert torch.equal(fine.to(torch.bfloat16), coarse)


def test_reference_and_ranks_hold_the_same_numbers():
    config = tiny_config("deepseek_v3", num_experts=6)
    reference = reference_model(config, "cpu", torch.float32, seed=4)
    for rank in range(4):
        decoder, weights = load_decoder(config, rank=rank, num_ranks=4, device="cpu", dtype=torch.float32, seed=4)
        mine, theirs = decoder._model.state_dict(), reference.model.state_dict()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert {name for name in theirs if name not in mine} == {
            f"layers.{layer}.mlp.experts.{part}" for layer in (1, 2) for part in ("gate_up_proj", "down_proj")
        }
        for layer, layer_weights in enumerate(weights):
            first, last = layer_weights.first_expert, layer_weights.first_expert + layer_weights.num_local_experts
            experts = reference.model.layers[layer + 1].mlp.experts
            assert torch.equal(layer_weights.gate_up, experts.gate_up_proj[first:last])
            assert torch.equal(layer_weights.down, experts.down_proj[first:last])
