"""What captured graphs keep of a GPU's memory."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe import Config, load_model
from pipemoe.model_facts.facts import cut_config
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.models import microbatch

pytestmark = pytest.mark.gpu
MOST = 4096


def pools():
    """Bytes that torch holds for graphs, by their pool."""
    found = {}
    for segment in torch.cuda.memory_snapshot():
        pool = tuple(segment["segment_pool_id"])
        if pool != (0, 0):
            found[pool] = found.get(pool, 0) + segment["total_size"]
    return found


def load(world):
    config = cut_config(MODEL_CONFIGS["qwen3-30b-a3b"], 2) | {"num_experts": 16}
    options = Config(mode="broadcast", max_tokens_per_rank=MOST, moe_max_num_tokens=MOST)
    return load_model(config, world, random_weights=True, dtype=torch.bfloat16, config=options)


def new_pools(before):
    return {pool: size for pool, size in pools().items() if pool not in before}


def test_small_graphs_take_no_memory_beside_the_largest(world, monkeypatch):
    before = pools()
    all_sizes = load(world)
    of_all = new_pools(before)
    most_rows = min(all_sizes.config.graph_tokens, MOST)
    monkeypatch.setattr(microbatch, "GRAPH_ROWS", (most_rows,))
    before = pools()
    largest = load(world)
    of_largest = new_pools(before)
    assert len(of_all) == len(of_largest) > 0
    assert max(of_all.values()) <= 1.2 * max(of_largest.values()), (of_all, of_largest)
    del all_sizes, largest
