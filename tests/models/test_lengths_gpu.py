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
WATCH = 20.0  # seconds until what waits is let go, to fail; sooner than the watchdog's


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


@pytest.fixture
def hold(world):
    """Holds up another stream while the test runs."""
    found = Hold(world.device)
    yield found
    found.release()
    torch.cuda.synchronize()


def begin(hold):
    """Let nothing go on in another stream from now on."""
    with torch.cuda.stream(torch.cuda.Stream()):
        hold.wait()


@contextmanager
def not_held_up(hold, what):
    """Fails if what is done meanwhile does not end before the hold does."""
    release = threading.Timer(WATCH, hold.release)
    release.start()
    try:
        yield
    finally:
        release.cancel()
    assert not hold.released, what


def prompt(draw, length):
    return [draw.randrange(4000) for _ in range(length)]


@pytest.mark.parametrize("most, share_long, steps", [(3000, 0.3, 200), (20_000, 0.8, 40)])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3"])
def test_no_length_waits_for_other_streams(world, hold, name, most, share_long, steps):
    model = load(name, world, most)
    model.prefill([[1, 2, 3]])  # what any first step makes
    draw = random.Random(name)
    begin(hold)
    for _ in range(steps):
        lengths = [round(2 ** draw.uniform(0, 9)) for _ in range(draw.randint(1, 6))]
        if draw.random() < share_long:
            lengths = [draw.randint(1, most)]
        with not_held_up(hold, lengths):
            found = model.prefill([prompt(draw, length) for length in lengths])
        assert all(found.finite), lengths


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3"])
def test_no_chunk_waits_for_other_streams(world, hold, name):
    """Of prompts that are many times as long as a round."""
    model, draw = load(name, world, 512), random.Random(name)
    with Engine(model, max_kept_tokens=6000) as engine:
        engine.submit([1, 2, 3]).result(WATCH)  # what any first round makes
        begin(hold)
        for _ in range(20):
            length = draw.randint(1, 6000)
            with not_held_up(hold, length):
                found = engine.submit(prompt(draw, length)).result(2 * WATCH)
            assert found.finite, length
        hold.release()
