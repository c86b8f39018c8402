"""After set-up no number of tokens or sequences waits for what else the GPU runs.

A kernel that is loaded inside a step would, and so may memory that CUDA allocates there.
"""

import importlib.util
import random
import threading

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe import Config, load_model
from pipemoe.model_facts.facts import cut_config
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from tests.runtime.hold import Hold

pytestmark = pytest.mark.gpu
MOST, STEPS = 3000, 200
WATCH = 90.0  # seconds until a step that waits is let go, to fail


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3"])
def test_no_length_waits_for_other_streams(world, name):
    layers = 3 if name == "qwen3-30b-a3b" else 5  # three of DeepSeek-V3's first layers are dense
    config = cut_config(MODEL_CONFIGS[name], layers) | {"vocab_size": 4000}
    if name == "deepseek-v3":
        config |= {"n_routed_experts": 16, "n_group": 4}
    model = load_model(
        config,
        world,
        random_weights=True,
        dtype=torch.bfloat16,
        config=Config(mode="broadcast", max_tokens_per_rank=MOST, moe_max_num_tokens=MOST),
    )
    model.prefill([[1, 2, 3]])  # what any first step makes
    draw, hold = random.Random(name), Hold(world.device)
    with torch.cuda.stream(torch.cuda.Stream()):
        hold.wait()
    release = threading.Timer(WATCH, hold.release)
    release.start()
    try:
        for _ in range(STEPS):
            lengths = [round(2 ** draw.uniform(0, 9)) for _ in range(draw.randint(1, 6))]
            if draw.random() < 0.3:
                lengths = [draw.randint(1, MOST)]
            found = model.prefill([[draw.randrange(4000) for _ in range(length)] for length in lengths])
            assert all(found.finite) and not hold.released, lengths
    finally:
        release.cancel()
        hold.release()
        torch.cuda.synchronize()
