"""A small model, its plain forward, and an engine on it."""

from __future__ import annotations

import pytest
import torch

import pipemoe
from tests.serving.models import comparison, small_model
from tests.serving.prompts import KEPT_TOKENS, STEP_TOKENS


@pytest.fixture(scope="package")
def dtype(world):
    """Chunks need attention that is fused on a GPU, and that computes in 16 bits."""
    return torch.bfloat16 if world.device.type == "cuda" else torch.float32


@pytest.fixture(scope="package")
def model(world, dtype):
    return small_model(world, dtype, "qwen3_moe")


@pytest.fixture(scope="package")
def is_right(world, dtype):
    """is_right(tokens, first): are these the plain model's logits?"""
    return comparison(world, dtype, "qwen3_moe")


@pytest.fixture
def open_engine(model):
    """open_engine(...): an engine with these settings. Every rank calls."""

    def new(**settings):
        usual = {"step_tokens": STEP_TOKENS, "max_kept_tokens": KEPT_TOKENS, "keep_logits": True}
        usual |= {"num_slots": model.world.num_slots}  # also where they share cores
        return pipemoe.Engine(model, **usual | settings)

    return new
