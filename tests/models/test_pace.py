"""Chunks of a sequence keep pace: none is further ahead than a layer of what continues it."""

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.plan.schedule import OpKind
from pipemoe.trace import Timeline
from tests.models.tiny import tiny_config

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_chunk_waits_for_the_layer_before_of_the_next_one(world, num_slots):
    config = Config(mode="two_batch", moe_max_num_tokens=20, max_tokens_per_rank=64, num_slots=num_slots, debug=True)
    model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=config)
    timeline = Timeline()
    model.prefill([list(range(1, 30))], timeline=timeline)
    at = {(s.op.cohort, s.op.layer): s for s in timeline.spans if s.op.kind is OpKind.ATTEND}
    layers = model.runtime.shape.num_layers
    assert len(at) == 2 * layers
    for layer in range(layers):
        assert at[1, layer].begin >= at[0, layer].end
        if layer and num_slots == 2:  # with one slot the second chunk begins when the first is done
            assert at[0, layer].begin >= at[1, layer - 1].end
