"""On a GPU no step allocates: torch asks CUDA for nothing between the first step and the last, whatever their sizes."""

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.plan.schedule import MODES
from tests.models.tiny import FAMILIES, VOCAB, tiny_config

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trial_attends_to_the_longest_sequence_in_the_first_two_layers(world, family, monkeypatch):
    """What it takes there is what a step may take.

    On every device, so that a GPU's set-up does not fail where no GPU test was run.
    """
    most = 64
    config = Config(max_tokens_per_rank=most, moe_max_num_tokens=64, num_slots=1)
    model = load_model(tiny_config(family), world, dtype=torch.float32, config=config)
    shape, attend, attended = model.decoder.shape, model.decoder.attend, []

    def noted(state, layer, y):
        rows, ids, weights = found = attend(state, layer, y)
        attended.append((layer, None if y is None else tuple(y.shape), len(rows), len(ids), len(weights)))
        assert rows.isfinite().all() and weights.isfinite().all() and ids.min() >= 0 and ids.max() < shape.num_experts
        return found

    monkeypatch.setattr(model.decoder, "attend", noted)
    world.engine.call(model._trial)
    assert attended == [(0, None, most, most, most), (1, (most, shape.hidden), most, most, most)]
    assert model.prefill([[1, 2, 3]]).first_tokens  # and steps begin anew


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_steps_allocate_nothing(world, mode):
    config = Config(mode=mode, max_tokens_per_rank=512, moe_max_num_tokens=256)
    model = load_model(tiny_config("qwen3_moe", num_layers=6), world, config=config)
    g = torch.Generator().manual_seed(world.rank)

    def step(lengths):
        model.prefill([torch.randint(0, VOCAB, (n,), generator=g).tolist() for n in lengths])

    before = torch.cuda.memory_stats()["num_device_alloc"]
    for lengths in ([3], [512], [100, 7], [1], [256, 256], [] if world.rank else [400]):
        step(lengths)
    world.all_gather(b"")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
