"""After set-up no number of tokens or sequences, and no chunk, waits for what else the GPU runs.

A kernel that is loaded inside a step would, and so may memory that CUDA allocates there.
"""

import importlib.util
import random
import threading
from contextlib import contextmanager

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe import Config, Engine, load_model
from pipemoe.model_facts.facts import cut_config
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from tests.runtime.hold import Hold

pytestmark = pytest.mark.gpu
WATCH = 90.0  # seconds until what waits is let go, to fail


def load(name, world, most):
    """The first layers of a model, for `most` tokens."""
    layers = 3 if name == "qwen3-30b-a3b" else 5  # three of DeepSeek-V3's first layers are dense
    config = cut_config(MODEL_CONFIGS[name], layers) | {"vocab_size": 4000}
    if name == "deepseek-v3":
        config |= {"n_routed_experts": 16, "n_group": 4}
    return load_model(
        config,
        world,
        random_weights=True,
        dtype=torch.bfloat16,
        config=Config(mode="broadcast", max_tokens_per_rank=most, moe_max_num_tokens=most),
    )


@contextmanager
def another_stream_held(device):
    """Yields the Hold of a stream on which nothing goes on."""
    hold = Hold(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        hold.wait()
    release = threading.Timer(WATCH, hold.release)
    release.start()
    try:
        yield hold
    finally:
        release.cancel()
        hold.release()
        torch.cuda.synchronize()


def prompt(draw, length):
    return [draw.randrange(4000) for _ in range(length)]


@pytest.mark.parametrize("most, share_long, steps", [(3000, 0.3, 200), (20_000, 0.8, 60)])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3"])
def test_no_length_waits_for_other_streams(world, name, most, share_long, steps):
    model = load(name, world, most)
    model.prefill([[1, 2, 3]])  # what any first step makes
    draw = random.Random(name)
    with another_stream_held(world.device) as hold:
        for _ in range(steps):
            lengths = [round(2 ** draw.uniform(0, 9)) for _ in range(draw.randint(1, 6))]
            if draw.random() < share_long:
                lengths = [draw.randint(1, most)]
            found = model.prefill([prompt(draw, length) for length in lengths])
            assert all(found.finite) and not hold.released, lengths


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3"])
def test_no_chunk_waits_for_other_streams(world, name):
    """Of prompts that are many times as long as a round."""
    model, draw = load(name, world, 512), random.Random(name)
    with Engine(model, max_kept_tokens=6000) as engine:
        engine.submit([1, 2, 3]).result(WATCH)  # what any first round makes
        with another_stream_held(world.device) as hold:
            for _ in range(40):
                length = draw.randint(1, 6000)
                found = engine.submit(prompt(draw, length)).result(2 * WATCH)
                assert found.finite and not hold.released, length
