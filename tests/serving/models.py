"""Small models for engines, and what their first tokens must be."""

from __future__ import annotations

from functools import cache

import torch

from pipemoe import Config, load_model
from pipemoe.models.random_weights import reference_model
from tests.models.tiny import tiny_config
from tests.moe_cases import norm_ratio


def small_model(world, dtype, family):
    config = tiny_config(family, num_layers=4)
    settings = Config(moe_max_num_tokens=20, max_tokens_per_rank=64, debug=True)
    return load_model(config, world, dtype=dtype, seed=3, config=settings)


def comparison(world, dtype, family):
    """A function of tokens and what an engine found: are these the plain model's logits?"""
    reference = reference_model(tiny_config(family, num_layers=4), device=world.device, dtype=dtype, seed=3)
    # Weights are drawn by the device, but computed with on the host: while rounds are open, nothing else may make CUDA
    # allocate or wait.
    reference = reference.float().cpu()

    @cache
    def wanted(tokens):
        with torch.no_grad():
            return reference(torch.tensor([tokens])).logits[0, -1]

    def compare(tokens, first) -> bool:
        right = wanted(tuple(tokens))
        if dtype is torch.float32:
            return norm_ratio(first.logits, right) < 1e-4 and first.token == int(right.argmax())
        # A router that is near a tie may choose another expert in 16 bits.
        return norm_ratio(first.logits, right) < 0.2

    return compare
