"""On a GPU no step allocates: torch asks CUDA for nothing between the first step and the last, whatever their sizes."""

import pytest
import torch

from pipemoe import Config, PipelinedMoE, load_model
from pipemoe.errors import ConfigError, FatalError
from pipemoe.plan.config import MODES
from pipemoe.runtime.reserve import Reserved, is_out_of_memory, lack_of_memory_told
from pipemoe.runtime.set_up import results_bytes
from tests.models.tiny import FAMILIES, VOCAB, tiny_config
from tests.moe_cases import HIDDEN, NUM_EXPERTS, TOP_K, make_layers, make_rows
from tests.runtime.sources import make_runtime

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
    world.conductor.call(model._trial)
    assert attended == [(0, None, most, most, most), (1, (most, shape.hidden), most, most, most)]
    assert model.prefill([[1, 2, 3]]).first_tokens  # and steps begin anew


def test_the_hosts_way_to_say_that_memory_does_not_suffice():
    for num_bytes in (1 << 60, 1 << 62):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(num_bytes, 1 << (num_bytes == 1 << 62) * 4, dtype=torch.uint8)
        assert is_out_of_memory(caught.value), caught.value
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(
        ValueError("memory")
    )


def test_only_a_lack_of_memory_is_told_as_one():
    words = "DefaultCPUAllocator: can't allocate memory"
    of_cuda = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")
    for error in (MemoryError("x"), torch.OutOfMemoryError("x"), RuntimeError(words), of_cuda):
        with pytest.raises(ConfigError, match="rank 3: out of memory at set-up"), lack_of_memory_told(3):
            raise error
    for error in (FatalError(f"rank 1: {words}"), RuntimeError("x"), ValueError("memory")):
        with pytest.raises(type(error)) as caught, lack_of_memory_told(3):
            raise error
        assert caught.value is error


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


@pytest.mark.gpu
@pytest.mark.parametrize("combine", ["reduce", "gather"])
def test_calls_with_ones_own_rows_allocate_nothing(world, combine):
    """Not even the first step: results come from memory that set-up has reserved on the caller's stream."""
    tokens, layers = 4096, make_layers(3, world.device, torch.bfloat16, hidden=128)
    rows = [make_rows(tokens, layer, world.device, torch.bfloat16, hidden=128) for layer in range(3)]
    config = Config(mode="chunked", max_tokens_per_rank=tokens, moe_max_num_tokens=512, num_slots=1, combine=combine)
    moe = PipelinedMoE(world, layers.local(world.size, world.rank), num_experts=NUM_EXPERTS, top_k=TOP_K, config=config)
    before = torch.cuda.memory_stats()["num_device_alloc"]
    for count in (tokens, 1, 0 if world.rank else 700):
        with moe.step(count) as step:
            for layer, (x, ids, weights) in enumerate(rows):
                y = step(layer, x[:count], ids[:count], weights[:count])  # held while the next layer's are computed
    del y
    torch.cuda.synchronize()
    world.all_gather(b"")
    assert torch.cuda.memory_stats()["num_device_alloc"] == before


def test_results_of_two_layers_are_reserved(world):
    """Per row [H] of what is summed, [H] of what is returned where that is another dtype, and K ids and weights;
    twice.
    """
    for combine, of_row in (("reduce", HIDDEN * 4), ("gather", HIDDEN * (4 + 2))):
        dtype = torch.float32 if combine == "reduce" else torch.bfloat16
        runtime = make_runtime(world, make_layers(1, world.device, dtype), combine=combine, combine_dtype="float32")
        reserved = results_bytes(runtime.config, runtime.shape, runtime.dtype, runtime.results_dtype)
        assert reserved == 2 * 160 * (of_row + 8 * TOP_K)


def test_the_largest_need_of_all_runtimes_is_reserved():
    reserved = Reserved()
    for num_bytes in (5, 9, 7):
        reserved.raise_lane("compute", 1, num_bytes)
        reserved.raise_stream("stream", 2 * num_bytes)
    reserved.raise_lane("combine", 1, 3)
    assert reserved.of_lane == {("compute", 1): 9, ("combine", 1): 3} and reserved.of_stream == {"stream": 18}
