"""An engine on a model with multi-head latent attention: rounds keep its latents, as they keep keys and values.

Two fixtures stand in here for the package's of the same names, and so for the model that `open_engine` takes.
"""

import random

import pytest

from tests.serving.models import comparison, small_model
from tests.serving.prompts import KEPT_TOKENS, STEP_TOKENS, WAIT, prompt

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def model(world, dtype):
    return small_model(world, dtype, "deepseek_v3")


@pytest.fixture(scope="module")
def is_right(world, dtype):
    return comparison(world, dtype, "deepseek_v3")


def test_long_prompts_go_chunk_by_chunk(world, model, open_engine, is_right):
    draw = random.Random(world.rank)
    lengths = [1, STEP_TOKENS + 1, 5 * STEP_TOKENS + 3, KEPT_TOKENS, *(draw.randint(1, KEPT_TOKENS) for _ in range(6))]
    with open_engine() as engine:
        assert model.takes_chunks and engine.settings.cuts
        asked = [(tokens, engine.submit(tokens)) for tokens in (prompt(n, 50 * world.rank + n) for n in lengths)]
        assert all(is_right(tokens, future.result(WAIT)) for tokens, future in asked)
        slots = engine.statistics()["slots"]
    assert sum(slot["tokens"] for slot in slots) == sum(lengths)
    assert slots[-1]["rounds_with_work"] >= KEPT_TOKENS // STEP_TOKENS
