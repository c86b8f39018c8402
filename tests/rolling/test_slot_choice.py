"""Predicted rounds, beside the clock; and which slot a sequence goes through."""

import pytest

from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import CoresCost, CostModel
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import Chunk
from pipemoe.rolling.round_time import RoundTime
from pipemoe.rolling.slot_choice import choose_slot

SHAPE = ModelShape(hidden=2048, intermediate=768, num_experts=128, top_k=8, num_layers=48)
SETTINGS = RollingSettings(max_tokens_per_round=8192, max_round_rows=32768, chunk_tokens=4096)


@pytest.mark.parametrize("cost", [CostModel(), CostModel(cores=CoresCost(permille=2000))])
@pytest.mark.parametrize(
    "lengths",
    [((20,), ()), ((8000,), (100,)), ((16000,), (200,), (3000,), ()), ((500, 500), (500,), (500,), (700,))],
)
def test_a_round_takes_about_what_the_clock_says(cost, lengths):
    config = PlanConfig(mode="chunked", num_slots=2)
    clock = simulate(plan(Facts(lengths), SHAPE, config, cost), cost).makespan - cost.start_ns
    chunks = [[Chunk(n, 0, length, length) for n, length in enumerate(of_rank)] for of_rank in lengths]
    assert RoundTime(SHAPE, cost, len(lengths), config.moe_max_num_tokens).of(chunks) == pytest.approx(clock, rel=0.1)


def test_later_chunks_take_longer_and_no_chunks_take_nothing():
    times = RoundTime(SHAPE, CostModel(), 4, 8192)
    assert times.of([(), (), (), ()]) == 0
    of_chunk = [times.of([[Chunk(0, start, start + 4096, 32768)], (), (), ()]) for start in range(0, 32768, 4096)]
    assert of_chunk == sorted(set(of_chunk))
    assert of_chunk[3] == times.of_tokens(4096, 3 * 4096)


@pytest.fixture
def choose():
    times = RoundTime(SHAPE, CostModel(), 4, 8192)
    return lambda length, *waiting, **changed: choose_slot(length, waiting, SETTINGS._replace(**changed), times)


def test_long_sequences_take_the_long_slot_and_short_ones_do_not(choose):
    assert [choose(length, 0, 0) for length in (1, 20, 1000, 4096, 4500, 8192, 20000)] == [0, 0, 0, 0, 1, 1, 1]


def test_short_rounds_take_no_sequence_that_is_longer_than_they_are(choose):
    assert choose(1000, 0, 0, short_round_rows=999) == 1


def test_a_short_sequence_never_waits_behind_long_ones(choose):
    """Also where it would be done sooner: what holds up a long sequence must hold up no short one."""
    assert choose(20, 50_000, 0) == 0
    assert choose(20, 50_000, 40_000, 0) == 1


def test_one_slot_takes_everything(choose):
    assert choose(20, 0) == choose(20_000, 7) == 0
