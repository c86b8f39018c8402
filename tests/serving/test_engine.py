"""pipemoe.Engine on the ranks of a world: first tokens are those of the plain model, whenever and wherever requests
come, and what goes wrong with one request is nothing to the others.
"""

import random
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager

import pytest
import torch

import pipemoe
from pipemoe import load_model
from pipemoe.errors import ConfigError, InputError, MismatchError, ModelError, QueueFull
from pipemoe.model import Model
from pipemoe.models.round_source import RoundSource
from tests.models.tiny import VOCAB, tiny_config
from tests.serving.prompts import KEPT_TOKENS, STEP_TOKENS, WAIT, prompt

pytestmark = pytest.mark.mpi
POLICIES = ("rolling", "lockstep", "lockstep_delayed")
LENGTHS = (1, 2, STEP_TOKENS - 1, STEP_TOKENS, STEP_TOKENS + 1, 3 * STEP_TOKENS, 5 * STEP_TOKENS + 3, KEPT_TOKENS)


@pytest.mark.parametrize("policy", POLICIES)
def test_first_tokens_of_requests_that_come_at_any_time(world, open_engine, is_right, policy):
    """Every rank submits another number of prompts, the last one none, some behind answers of earlier ones."""
    draw = random.Random(world.rank)
    count = 0 if world.rank == world.size - 1 and world.rank else 12
    with open_engine(policy=policy, delay_seconds=0.002) as engine:
        asked = []
        for i in range(count):
            tokens = prompt(draw.choice(LENGTHS), 1000 * world.rank + i)
            asked.append((tokens, engine.submit(tokens, priority=draw.choice((-128, 0, 127)))))
            if draw.random() < 0.3:
                asked[draw.randrange(len(asked))][1].result(WAIT)
        for tokens, future in asked:
            first = future.result(WAIT)
            assert is_right(tokens, first) and first.finite
            assert first.queued <= first.admitted <= first.first_token
        assert engine.drain(WAIT)
        found = engine.statistics()
        assert (found["submitted"], found["answered"], found["queued"]) == (count, count, 0)
        assert sum(slot["tokens"] for slot in found["slots"]) == sum(len(tokens) for tokens, _ in asked)
    assert all(slot["kept_tokens"] == 0 for slot in engine.statistics()["slots"])
    assert all(slot.rounds.has_ended for slot in engine._loop.slots)


def test_long_prompts_are_cut_and_short_ones_pass_beside_them(world, open_engine, is_right):
    """In rolling steps a long prompt takes a chunk a round of the last slot, and short ones go through the others."""
    with open_engine() as engine:
        long, short = prompt(5 * STEP_TOKENS + 3, world.rank), prompt(5, world.rank)
        asked = [(tokens, engine.submit(tokens)) for tokens in (long, short)]
        assert all(is_right(tokens, future.result(WAIT)) for tokens, future in asked)
        slots = engine.statistics()["slots"]
        if len(slots) > 1 and engine.settings.cuts:
            assert slots[-1]["tokens"] == len(long) and slots[-1]["rounds_with_work"] >= 6
            assert sum(slot["tokens"] for slot in slots[:-1]) == len(short)


def test_one_engine_after_another_and_steps_between(world, model, open_engine):
    """While one is open the world does nothing else; then everything goes on."""
    tokens = [prompt(9, 7)]
    wanted = model.prefill(tokens).first_tokens
    for _ in range(2):
        with open_engine() as engine:
            for refused in (
                lambda: model.prefill(tokens),
                lambda: world.all_gather(b""),
                lambda: pipemoe.Engine(model),
                lambda: load_model(tiny_config("qwen3_moe"), world),
            ):
                with pytest.raises(InputError, match="an Engine is open"):
                    refused()
            assert [engine.submit(tokens[0]).result(WAIT).token] == wanted
        engine.close()
        assert model.prefill(tokens).first_tokens == wanted
    with pytest.raises(InputError, match="the engine is closed"):
        engine.submit(tokens[0])
    with pytest.raises(InputError, match="the engine is closed"):
        engine.submit([])


@pytest.mark.parametrize(
    ("tokens", "priority", "text"),
    [
        ([VOCAB], 0, f"tokens holds token id {VOCAB}"),
        ([-1], 0, "tokens holds token id -1"),
        ([], 0, "tokens is empty"),
        ("words", 0, "not a list of token ids"),
        ([1.5], 0, "not a list of token ids"),
        ([1] * (KEPT_TOKENS + 1), 0, "this engine takes at most"),
        ([1], 128, "priority is 128; it must be from -128 to 127"),
        ([1], -129, "whole number of at least -128"),
        ([1], "high", "whole number"),
    ],
)
def test_a_wrong_request_fails_alone(world, open_engine, is_right, tokens, priority, text):
    """On the last rank; all others go on, and so does it."""
    with open_engine() as engine:
        good = prompt(20, world.rank)
        first = engine.submit(good)
        if world.rank == world.size - 1:
            with pytest.raises(InputError, match=text):
                engine.submit(tokens, priority).result(WAIT)
            assert engine.statistics()["failed"] == 1
        assert is_right(good, first.result(WAIT))


def test_model_code_that_raises_fails_its_rounds_requests_alone(world, model, open_engine, is_right, monkeypatch):
    """The request whose second chunk meets the error fails as a whole; its keys are broken, and no later chunk reads
    them. Later requests of this rank, and all of the others, are right.
    """
    marked, attend, met = prompt(5 * STEP_TOKENS + 3, 99), RoundSource.attend, []

    def broken(source, cohort, layer, rows=None):
        if any(piece.length == len(marked) and piece.start for piece in source._pieces) and layer == 1 and not met:
            met.append(layer)
            raise ValueError("planted")
        return attend(source, cohort, layer, rows)

    fails = world.rank == 0 and model.takes_chunks
    with open_engine() as engine:
        if fails:
            monkeypatch.setattr(RoundSource, "attend", broken)
            with pytest.raises(ModelError, match="ValueError: planted"):
                engine.submit(marked).result(WAIT)
        for length in (3, 40, 4 * STEP_TOKENS):
            tokens = prompt(length, 10 * length + world.rank)
            assert is_right(tokens, engine.submit(tokens).result(WAIT))
        assert engine.statistics()["failed"] == int(fails)
    assert all(slot["kept_tokens"] == 0 for slot in engine.statistics()["slots"])


def test_cancelled_requests_hold_up_nobody(world, open_engine, is_right):
    """Cancelled at once, half-way or too late: the others are right, and all memory is free at the end."""
    draw = random.Random(10 + world.rank)
    with open_engine(max_queue=100) as engine:
        asked = []
        for i in range(25):
            tokens = prompt(draw.choice(LENGTHS), 50 * world.rank + i)
            asked.append((tokens, engine.submit(tokens)))
            if draw.random() < 0.5:
                asked[draw.randrange(len(asked))][1].cancel()
        assert engine.drain(WAIT)
        assert not wait([future for _, future in asked], WAIT).not_done
        cancelled = 0
        for tokens, future in asked:
            if future.cancelled():
                cancelled += 1
                assert future.cancel()  # again
                with pytest.raises(CancelledError):
                    future.result()
            else:
                assert not future.cancel()  # too late
                assert is_right(tokens, future.result())
        found = engine.statistics()
        assert (found["cancelled"], found["answered"], found["queued"]) == (cancelled, 25 - cancelled, 0)
    assert all(slot["kept_tokens"] == 0 for slot in engine.statistics()["slots"])


class Held:
    """Holds up this rank's attention until released."""

    def __init__(self, model, monkeypatch):
        self.reached, self._go_on, attend = threading.Event(), threading.Event(), model.decoder.attend

        def held(*arguments):
            self.reached.set()
            assert self._go_on.wait(WAIT)
            return attend(*arguments)

        monkeypatch.setattr(model.decoder, "attend", held)
        self.release = self._go_on.set


@pytest.mark.parametrize("when_full", ["error", "wait"])
def test_a_full_queue(world, model, open_engine, monkeypatch, when_full):
    """Two may wait, besides those that run. With "wait", a third submit returns once one of them is admitted."""
    if world.device.type == "cuda":
        pytest.skip("attention of the host can be held up in its thread")
    with open_engine(policy="lockstep", max_queue=2, when_full=when_full) as engine:
        if world.rank == 0:
            held = Held(model, monkeypatch)
            running = [engine.submit([1] * STEP_TOKENS)]
            assert held.reached.wait(WAIT)
            running += [engine.submit([2] * STEP_TOKENS)]
            # It may have been admitted to the next round already: so fill the queue until it is full.
            if when_full == "error":
                with pytest.raises(QueueFull, match="max_queue"):
                    for _ in range(3 + 2):
                        running.append(engine.submit([3] * STEP_TOKENS))
                assert engine.statistics()["queued"] == 2
                held.release()
            else:
                waiting = threading.Thread(target=lambda: running.extend(engine.submit([3]) for _ in range(5)))
                waiting.start()
                held.release()
                waiting.join(WAIT)
                assert len(running) == 7
            assert all(future.result(WAIT) for future in running)


def test_higher_priority_goes_first(world, model, open_engine, monkeypatch):
    if world.device.type == "cuda":
        pytest.skip("attention of the host can be held up in its thread")
    with open_engine(policy="lockstep") as engine:
        if world.rank == 0:
            held = Held(model, monkeypatch)
            first = [engine.submit([1] * STEP_TOKENS) for _ in range(2)]
            assert held.reached.wait(WAIT)
            low, high = (engine.submit([2] * STEP_TOKENS, priority) for priority in (-3, 5))
            later = [engine.submit([2] * STEP_TOKENS) for _ in range(4)]
            held.release()
            wait([*first, low, high, *later], WAIT)
            assert high.result().admitted <= min(f.result().admitted for f in later)
            assert low.result().admitted >= max(f.result().admitted for f in later)


def test_a_short_slot_that_is_closed_does_not_leave_while_anything_is_left_for_it(
    world, model, open_engine, monkeypatch
):
    """A long round may open it again."""
    if world.device.type == "cuda":
        pytest.skip("attention of the host can be held up in its thread")
    if world.num_slots < 2:
        pytest.skip("needs two slots")
    with open_engine(beside_rows=10**6) as engine:
        if world.rank == 0:
            held = Held(model, monkeypatch)
            asked = [engine.submit([1] * STEP_TOKENS)]
            assert held.reached.wait(WAIT)
            asked.append(engine.submit([2]))
            engine.requests.close()
            short, pause, until = engine._loop.slots[0], threading.Event(), time.monotonic() + WAIT
            while not short.is_leaving and time.monotonic() < until:
                pause.wait(0.002)
            assert short.is_leaving and len(engine._loop.queue) == 1 and not short._leaves
            held.release()
            assert all(future.result(WAIT) for future in asked)


@pytest.mark.gpu
def test_rounds_make_cuda_allocate_nothing(world, open_engine):
    """An allocation waits for what runs in other slots."""
    draw = random.Random(world.rank)
    with open_engine() as engine:

        def serve() -> int:
            asked = [engine.submit(prompt(draw.choice(LENGTHS), i)) for i in range(30)]
            assert all(future.result(WAIT) for future in asked)
            return torch.cuda.memory_stats()["num_device_alloc"]

        assert serve() == serve()


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"policy": "fastest"}, ConfigError, "policy is 'fastest'"),
        ({"max_queue": 0}, ConfigError, "max_queue"),
        ({"when_full": "maybe"}, ConfigError, "when_full is 'maybe'"),
        ({"max_kept_tokens": 3}, ConfigError, "max_kept_tokens is 3"),
        ({"step_tokens": 65}, ConfigError, "more than max_tokens_per_rank=64"),
        ({"step_tokens": 1.5}, ConfigError, "step_tokens is 1.5"),
        ({"delay_seconds": -1}, ConfigError, "delay_seconds is -1"),
        ({"keep_logits": 1}, ConfigError, "keep_logits is 1"),
        ({"num_slots": 0}, ConfigError, "num_slots is 0"),
        ({"num_slots": 99}, ConfigError, "num_slots is 99"),
        ({"step_tokens": 32}, MismatchError, "step_tokens is 32"),
    ],
)
def test_wrong_arguments_on_one_rank_are_an_error_on_all(world, open_engine, settings, error, text):
    if error is MismatchError and world.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(error, match=text):
        open_engine(**settings if world.rank == world.size - 1 else {})
    with open_engine() as engine:  # nothing is left open
        assert engine.submit([1]).result(WAIT)


class Reserved:
    """Stands for memory."""


def refuse(*args, **kwargs):
    raise torch.OutOfMemoryError("planted")


@contextmanager
def reserved_in_vain(patch, held):
    """What `held` refers to at the end must be gone when it is given back, which happens once."""
    given_back, no_rounds = [], Model.no_rounds

    def noted(model):
        given_back.append([ref() for ref in held])
        no_rounds(model)

    patch.setattr(Model, "no_rounds", noted)
    yield
    assert given_back == [[None]]


@pytest.mark.parametrize("in_a_lane", [False, True])
def test_a_lack_of_memory_on_one_rank_is_an_error_on_all(world, open_engine, is_right, monkeypatch, in_a_lane):
    """And nothing holds what has been reserved in vain when it is given back."""
    held, rounds = [], Model.rounds

    def planted(model, *args):
        if world.rank < world.size - 1:
            found = rounds(model, *args)
            held.append(weakref.ref(found))
            return found
        room = Reserved()
        held.append(weakref.ref(room))
        return model.runtime.in_compute_lanes(refuse, "planting a fault") if in_a_lane else refuse()

    with monkeypatch.context() as patch, reserved_in_vain(patch, held):
        patch.setattr(Model, "rounds", planted)
        with pytest.raises(ConfigError, match=f"rank {world.size - 1}: .*memory.*planted"):
            open_engine()
    with open_engine() as engine:
        assert is_right(prompt(5, 0), engine.submit(prompt(5, 0)).result(WAIT))


def test_a_first_step_that_fails_on_one_rank_is_an_error_on_all(world, model, open_engine, is_right, monkeypatch):
    """And is told once: the next step works. What was reserved is let go before it is given back."""
    held, rounds = [], Model.rounds

    def watched(model, *args):
        found = rounds(model, *args)
        held.append(weakref.ref(found))
        return found

    with monkeypatch.context() as patch, reserved_in_vain(patch, held):
        patch.setattr(Model, "rounds", watched)
        if world.rank == world.size - 1:
            patch.setattr(type(model.decoder), "finish", refuse)
        with pytest.raises(ModelError, match=f"rank {world.size - 1}: .*planted"):
            open_engine()
    model.prefill([[1, 2]])
    with open_engine() as engine:
        assert is_right(prompt(5, 0), engine.submit(prompt(5, 0)).result(WAIT))


def test_metrics(world, open_engine):
    prometheus = pytest.importorskip("prometheus_client")
    with open_engine() as engine:
        registry = prometheus.CollectorRegistry()
        registry.register(engine.collector())
        engine.submit(prompt(5, 0)).result(WAIT)
        assert engine.drain(WAIT)
        labels = {"rank": str(world.rank)}
        assert registry.get_sample_value("pipemoe_answered_total", labels) == 1
        found = [
            registry.get_sample_value("pipemoe_slot_tokens_total", labels | {"slot": str(slot)})
            for slot in range(len(engine.statistics()["slots"]))
        ]
        assert sum(found) == 5
