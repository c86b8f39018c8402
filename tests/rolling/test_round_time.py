"""Predicted rounds, beside the clock."""

from dataclasses import replace

import pytest

from pipemoe.model_facts.dimensions import dimensions_of_facts
from pipemoe.model_facts.known_models import model_config
from pipemoe.model_facts.limits import supported_facts
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS
from pipemoe.plan.cost.model import CoresCost, CostModel, ExchangeCost, HostCost
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape
from pipemoe.rolling.offer import Chunk
from pipemoe.rolling.round_time import Pace, RoundTime

SHAPE = ModelShape(hidden=2048, intermediate=768, num_experts=128, top_k=8, num_layers=48)
HOST, SLOW = HostCost(), ExchangeCost(row_ps=100_000)


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


def test_what_a_round_costs_by_itself_and_what_attention_costs_in_rows():
    times = RoundTime(SHAPE, CostModel(), 4, 8192)
    fixed, pairs = times.fixed_rows(), times.pairs_per_row()

    def line(tokens: int) -> int:
        return times.of([[Chunk(n, 0, 128, 128) for n in range(tokens // 128)]] * 4)

    assert line(16384) == pytest.approx(line(8192) * (16384 + fixed) / (8192 + fixed), rel=0.01)
    more = times.of([[Chunk(0, 8192, 16384, 16384)]] * 4) - times.of([[Chunk(0, 0, 8192, 8192)]] * 4)
    assert more == pytest.approx(8192 * 8192 / pairs * (line(16384) - line(8192)) / 8192, rel=0.05)


@pytest.mark.parametrize(
    ("cost", "num_ranks", "slots"),
    [
        (CostModel(), 4, 2),
        (CostModel(), 16, 1),  # experts take nearly all the time
        (CostModel(host=replace(HOST, graph_ns=20 * HOST.graph_ns)), 4, 1),  # whatever it does, it issues meanwhile
        (CostModel(dispatch=SLOW, combine=SLOW), 16, 2),
    ],
)
def test_two_slots_roll_where_a_usual_round_leaves_ranks_idle_for_a_sixth_of_its_time(cost, num_ranks, slots):
    times = RoundTime(SHAPE, cost, num_ranks, 8192)
    usual = [[Chunk(n, 0, 128, 128) for n in range(16)]] * num_ranks
    assert times.useful_slots() == slots
    assert (max(times.busy(usual)) <= times.of(usual) * 5 / 6) == (slots == 2)


@pytest.mark.parametrize(
    ("model", "gpu", "num_ranks", "sharing", "slots", "beside"),
    [
        ("qwen3-30b-a3b", "h200", 1, 1, 1, True),
        ("mixtral-8x7b", "h100", 2, 1, 1, True),  # idle for .111 of the time
        ("mixtral-8x7b", "h200", 4, 1, 2, True),  # .193
        ("qwen3-30b-a3b", "h200", 4, 1, 2, True),
        ("qwen3-30b-a3b", "h200", 4, 4, 2, False),
    ],
)
def test_slots_by_derived_costs(model, gpu, num_ranks, sharing, slots, beside):
    dimensions = dimensions_of_facts(supported_facts(model_config(model)))
    cost = default_cost(GPUS[gpu], dimensions, num_ranks, value_bytes=2, sum_bytes=2, ranks_per_device=sharing, ctas=0)
    times = RoundTime(dimensions.shape, cost, num_ranks, 8192)
    assert times.useful_slots() == slots
    assert times.beside_rows() == (8 * times.fixed_rows() if beside else 0)


def test_ranks_on_cores_never_close_a_slot():
    assert RoundTime(SHAPE, CostModel(cores=CoresCost(permille=64000)), 4, 8192).beside_rows() == 0


def test_a_round_is_late_beside_the_rounds_before_it():
    pace = Pace()
    assert pace.lag(99.0, 1.0) == 0  # nothing is known
    pace.note(10.0, 2.0)
    assert pace.lag(10.0, 2.0) == 1000 and pace.lag(10.0, 1.0) == 2000
    for _ in range(100):
        pace.note(3.0, 1.0)
    assert pace.lag(6.0, 1.0) == pytest.approx(2000, abs=2)
    pace.note(5.0, 0.0)
    assert pace.lag(5.0, 0.0) == 0
