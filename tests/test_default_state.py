"""The caller's global state of torch, numpy, random and warnings has no influence: no error, the same bits, and stays
as it is.
"""

import contextlib
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pipemoe import Config, ExpertWeights, PipelinedMoE, load_model
from pipemoe.plan.config import MODES
from tests.models.tiny import tiny_config
from tests.moe_cases import NUM_EXPERTS, TOP_K, make_layers, make_rows, norm_ratio

SMALL = {"moe_max_num_tokens": 24, "max_tokens_per_rank": 40}
COUNTS = (7, 0, 30, 1)  # per rank
FAMILIES = ("qwen3_moe", "deepseek_v3")


@contextlib.contextmanager
def changed(get, change, value):
    before = get()
    change(value)
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def default_dtype(dtype):
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


STATES = {
    "inference_mode": lambda: torch.inference_mode(),
    "no_grad": lambda: torch.no_grad(),
    "grad": lambda: torch.enable_grad(),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: default_device("meta"),
    "default device cpu": lambda: default_device("cpu"),
    "deterministic algorithms": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly detection": lambda: torch.autograd.detect_anomaly(),
    "numpy raises": lambda: np.errstate(all="raise"),
    "warnings are errors": warnings_are_errors,
    "two threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 2),
    "flush denormals": lambda: changed(lambda: False, torch.set_flush_denormal, True),
}
PLAIN = ("inference_mode", "no_grad", "grad")


@pytest.fixture(scope="module")
def given(world):
    """Layers, rows for each, and prompts, made in a plain state."""
    layers = make_layers(2, world.device, torch.float32)
    tokens = COUNTS[world.rank % len(COUNTS)]
    return (
        layers,
        [make_rows(tokens, 10 * layer + world.rank, world.device, torch.float32) for layer in range(2)],
        [[1, 2, 3], [4 + world.rank] * 9],
    )


def make_moe(world, layers, **options):
    return PipelinedMoE(
        world,
        layers.local(world.size, world.rank),
        num_experts=NUM_EXPERTS,
        top_k=TOP_K,
        config=Config(**SMALL, **options),
    )


def run_step(moe, rows):
    with moe.step(len(rows[0][0])) as step:
        return [step(layer, *of_layer) for layer, of_layer in enumerate(rows)]


def everything(world, layers, rows, prompts):
    """All that the library computes from these, made anew: sums of the layers, first tokens and logits."""
    found = run_step(make_moe(world, layers, deterministic=True), rows)
    for family in FAMILIES:
        model = load_model(
            tiny_config(family),
            world,
            dtype=torch.float32,
            seed=3,
            config=Config(**SMALL, deterministic=True, mode="two_batch"),
        )
        prefilled = model.prefill(prompts, keep_logits=True)
        found += [prefilled.logits, torch.tensor(prefilled.first_tokens, device=world.device)]
    return found


@pytest.fixture(scope="module")
def wanted(world, given):
    return everything(world, *given)


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("state", STATES)
def test_the_same_bits_in_any_state(world, given, wanted, state):
    if state == "deterministic algorithms" and world.device.type == "cuda":
        pytest.skip("torch refuses cuBLAS's products then")
    with STATES[state]():
        found = everything(world, *given)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.mpi
@pytest.mark.parametrize("combine", ["reduce", "gather"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_combine_in_every_grad_mode(world, given, mode, combine):
    layers, rows, _ = given
    moe = make_moe(world, layers, mode=mode, combine=combine)
    outcomes = []
    for state in PLAIN:
        with STATES[state]():
            # inference tensors, in inference mode
            inside = [(x.clone(), ids.clone(), weights.clone()) for x, ids, weights in rows]
            outcomes += [run_step(moe, rows), run_step(moe, inside)]
    needs_grad = [(x.clone().requires_grad_(), ids, weights.clone().requires_grad_()) for x, ids, weights in rows]
    outcomes += [run_step(moe, needs_grad), on_another_thread(lambda: run_step(moe, inside))]
    for found in outcomes:
        for layer, y in enumerate(found):
            assert norm_ratio(y, layers.oracle(layer, *(t.detach() for t in rows[layer]))) < 1e-5
            assert not y.requires_grad and not y.is_inference()


def on_another_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.mpi
def test_a_call_of_one_layer_in_inference_mode_and_with_gradients(world, given):
    layers, rows, _ = given
    one = PipelinedMoE(
        world, layers.local(world.size, world.rank)[:1], num_experts=NUM_EXPERTS, top_k=TOP_K, config=Config(**SMALL)
    )
    wanted = layers.oracle(0, *rows[0])
    for state in ("inference_mode", "default dtype bfloat16", "default device meta"):
        with STATES[state]():
            y = one(*rows[0])
        assert norm_ratio(y, wanted) < 1e-5
    x, ids, weights = rows[0]
    y = one((2 * x.clone().requires_grad_()) / 2, ids, weights)
    assert norm_ratio(y, wanted) < 1e-5 and not y.requires_grad


@pytest.mark.mpi
def test_what_was_made_in_inference_mode_or_wants_gradients_serves_outside(world, given):
    layers, rows, prompts = given
    with torch.inference_mode():
        model = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=Config(**SMALL))
        weights = [
            ExpertWeights(w.gate_up.clone(), w.down.clone(), first_expert=w.first_expert)
            for w in layers.local(world.size, world.rank)
        ]
    trained = [
        ExpertWeights(
            torch.nn.Parameter(w.gate_up.clone()), torch.nn.Parameter(w.down.clone()), first_expert=w.first_expert
        )
        for w in weights
    ]
    for of_layers in (weights, trained):
        moe = PipelinedMoE(world, of_layers, num_experts=NUM_EXPERTS, top_k=TOP_K, config=Config(**SMALL))
        for layer, y in enumerate(run_step(moe, rows)):
            assert norm_ratio(y, layers.oracle(layer, *rows[layer])) < 1e-5
    again = load_model(tiny_config("qwen3_moe"), world, dtype=torch.float32, seed=3, config=Config(**SMALL))
    found = [m.prefill(prompts, keep_logits=True) for m in (model, again)]
    assert found[0].first_tokens == found[1].first_tokens and torch.equal(found[0].logits, found[1].logits)


@pytest.mark.mpi
def test_the_callers_state_stays_as_it_is(world, given):
    layers, rows, prompts = given
    torch.manual_seed(5), np.random.seed(5), random.seed(5)

    def states():
        return (
            torch.get_rng_state().tolist(),
            [str(part) for part in np.random.get_state()],
            random.getstate(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_autocast_enabled("cpu"),
            np.geterr(),
            warnings.filters[:],
            os.getcwd(),
        )

    before = states()
    everything(world, layers, rows, prompts)
    assert states() == before


PROGRAM = """
import numpy as np, torch, warnings
warnings.simplefilter("error", UserWarning)
torch.set_default_dtype(torch.bfloat16)
torch.set_default_device("meta")
torch.set_grad_enabled(False)
np.seterr(all="raise")
import pipemoe
world = pipemoe.init("cpu", watchdog_seconds=60)
from tests.models.tiny import tiny_config
config = tiny_config("qwen3_moe")
chunked = pipemoe.Config(mode="chunked", max_tokens_per_rank=40)
model = pipemoe.load_model(config, world, dtype=torch.float32, seed=3, config=chunked)
found = model.prefill([[1, 2, 3]], keep_logits=True).logits
torch.set_default_dtype(torch.float32)
torch.set_default_device(None)
torch.set_grad_enabled(True)
np.seterr(all="warn")
from pipemoe.models.random_weights import reference_model
wanted = reference_model(config, device="cpu", dtype=torch.float32, seed=3)(torch.tensor([[1, 2, 3]])).logits[:, -1]
assert (found - wanted).norm() < 1e-4 * wanted.norm(), (found, wanted)
"""


def test_a_process_that_changed_everything_before_the_import():
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
