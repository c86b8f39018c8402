"""On a GPU no step allocates: torch asks CUDA for nothing between the first step and the last, whatever their sizes."""

import pytest
import torch

from pipemoe import Config, load_model
from pipemoe.plan.schedule import MODES
from pipemoe.runtime.reserve import is_out_of_memory
from tests.models.tiny import FAMILIES, VOCAB, tiny_config

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trial_runs(world, family):
    """On every device, so that a GPU's set-up does not fail where no GPU test was run."""
    model = load_model(tiny_config(family), world, dtype=torch.float32, config=Config(max_tokens_per_rank=64, moe_max_num_tokens=64, num_slots=1))
    world.engine.call(model._trial)


def test_the_hosts_way_to_say_that_memory_does_not_suffice():
    for num_bytes in (1 << 60, 1 << 62):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(num_bytes, 1 << (num_bytes == 1 << 62) * 4, dtype=torch.uint8)
        assert is_out_of_memory(caught.value), caught.value
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(ValueError("memory"))


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
