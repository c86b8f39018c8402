"""A small model, its plain forward, and an engine on it."""

from __future__ import annotations

import pytest
import torch

import pipemoe
from pipemoe.rolling.engine_settings import engine_settings
from pipemoe.serving import engine
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
    """open_engine(...): an engine with these settings. Every rank calls. beside_rows: see RollingSettings; the cost
    model has its say on GPUs only.
    """

    def new(beside_rows=0, **settings):
        def settings_of(*arguments, **more):
            return engine_settings(*arguments, **more)._replace(beside_rows=beside_rows)

        usual = {"step_tokens": STEP_TOKENS, "max_kept_tokens": KEPT_TOKENS, "keep_logits": True}
        usual |= {"num_slots": model.world.num_slots}  # also where they share cores
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "engine_settings", settings_of)
            return pipemoe.Engine(model, **usual | settings)

    return new
