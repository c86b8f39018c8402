"""A small model, its plain forward, and an engine on it."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import pipemoe
from pipemoe import Config, load_model
from pipemoe.models.random_weights import reference_model
from tests.models.tiny import tiny_config
from tests.moe_cases import norm_ratio
from tests.serving.prompts import KEPT_TOKENS, STEP_TOKENS


@pytest.fixture(scope="package")
def dtype(world):
    """Chunks need attention that is fused on a GPU, and that computes in 16 bits."""
    return torch.bfloat16 if world.device.type == "cuda" else torch.float32


@pytest.fixture(scope="package")
def model(world, dtype):
    config = tiny_config("qwen3_moe", num_layers=4)
    settings = Config(moe_max_num_tokens=20, max_tokens_per_rank=64, debug=True)
    return load_model(config, world, dtype=dtype, seed=3, config=settings)


@pytest.fixture(scope="package")
def is_right(world, dtype):
    """is_right(tokens, first): are these the plain model's logits?"""
    reference = reference_model(tiny_config("qwen3_moe", num_layers=4), device=world.device, dtype=dtype, seed=3)
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


@pytest.fixture
def open_engine(model):
    """open_engine(...): an engine with these settings. Every rank calls."""

    def new(**settings):
        usual = {"step_tokens": STEP_TOKENS, "max_kept_tokens": KEPT_TOKENS, "keep_logits": True}
        usual |= {"num_slots": model.world.num_slots}  # also where they share cores
        return pipemoe.Engine(model, **usual | settings)

    return new
