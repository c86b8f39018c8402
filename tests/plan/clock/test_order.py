"""The total order: cohorts' operations by hand, and how several cohorts' are merged."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.plan.clock.order import merge_orders, order_keys
from pipemoe.plan.clock.prediction import costs_of
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import (
    AttendCost,
    ContentionCost,
    CostModel,
    ExchangeCost,
    ExpertsCost,
    HostCost,
    SmsCost,
    rates_of,
)
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape, OpKind

SHAPE = ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=2, num_layers=3)
FREE = ContentionCost(**{f.name: 1000 for f in fields(ContentionCost)})
ATTEND, DISPATCH, EXPERTS, COMBINE, FINISH = OpKind


def cost_of(host_ns=0, **changes):
    """ns a row: attention 2, experts 12, dispatch 3, combine 5; finish 40, launches 0. host_ns: to issue anything."""
    every = {
        "attend": AttendCost(0, 0, 2_000, 0),
        "experts": ExpertsCost(0, 0, 0, 12_000, 1),
        "dispatch": ExchangeCost(0, 0, 3_000),
        "combine": ExchangeCost(0, 0, 5_000),
        "host": replace(HostCost(*(host_ns,) * 9), graph_rows=0),
        "sms": SmsCost(crowded_experts_permille=1000),
    }
    return CostModel(**(every | changes), contention=FREE, start_ns=0, finish_ns=40)


def starts(p, cost):
    """Per cohort: its operations, each with the time by which it is ordered."""
    keys = order_keys(costs_of(p, cost), rates_of(cost), p.config.num_slots, p.shape.num_layers)
    ops_of = [[op for op in p.ops if op.cohort == c] for c in range(len(p.cohorts))]
    return [list(zip(ops, keys[c].tolist())) for c, ops in enumerate(ops_of)]


def planned(lengths, mode="broadcast", cost=None, assignment=None, **options):
    cost = cost or cost_of()
    config = PlanConfig(mode=mode, max_tokens_per_rank=1000, **options)
    return starts(plan(Facts(lengths), SHAPE, config, cost, assignment=assignment), cost)


def nanoseconds(p_starts):
    """How long each operation holds up what follows it in its cohort, of one layer after the first."""
    return [b - a for (_, a), (_, b) in zip(p_starts, p_starts[1:])]


def test_a_cohort_alone_starts_each_operation_when_the_one_before_ends():
    """Ranks of 10 and 30 rows: the longer one attends 60 ns, which all wait for."""
    cost = cost_of()
    (of_cohort,) = planned(((10,), (30,)), cost=cost)
    kinds, times = [op.kind for op, _ in of_cohort], [at for _, at in of_cohort]
    assert kinds == [ATTEND, DISPATCH, EXPERTS, COMBINE] * 3 + [FINISH] and times[0] == 0
    p = plan(Facts(((10,), (30,))), SHAPE, PlanConfig(mode="broadcast", max_tokens_per_rank=1000), cost)
    exchange = costs_of(p, cost).exchange[0, :, 0, 0].tolist()
    experts = int(costs_of(p, cost).compute[0, 0, 1, 0])
    assert exchange == [90, 200] and experts > 0  # all rows but those of the least sender; all rows
    assert nanoseconds(of_cohort) == [60, 90, experts, 200] * 3


def test_the_first_attention_takes_what_comes_before_it_along():
    cost = cost_of(attend=AttendCost(0, 0, 2_000, 0, 0, 0, 1_000))
    (of_cohort,) = planned(((10,), (30,)), cost=cost)
    (plain,) = planned(((10,), (30,)))
    first, *others = nanoseconds(plain)
    assert nanoseconds(of_cohort) == [first + 30, *others]


def test_the_dispatch_of_a_wave_goes_ahead_of_the_experts_of_the_one_before():
    (of_cohort,) = planned(((10,), (30,)), "chunked", moe_max_num_tokens=15)
    layer = [(op.kind, op.wave) for op, _ in of_cohort if op.layer == 1]
    ahead = [(ATTEND, 0), (DISPATCH, 0), (DISPATCH, 1), (EXPERTS, 0), (COMBINE, 0)]
    assert layer == ahead + [(DISPATCH, 2), (EXPERTS, 1), (COMBINE, 1), (EXPERTS, 2), (COMBINE, 2)]


def test_what_is_issued_slowly_lasts_as_long():
    (of_cohort,) = planned(((10,), (30,)), cost=cost_of(host_ns=5_000))
    assert nanoseconds(of_cohort) == [5_000] * 12


def test_a_slot_is_handed_on_when_its_cohort_has_finished():
    """Three cohorts, two slots: the third one begins behind the first."""
    first, second, third = planned(((10,), (20,), (30,)), "per_rank", num_slots=2)
    assert first[0][1] == second[0][1] == 0
    assert first[-1][0].kind is FINISH and third[0][1] == first[-1][1] + 1


def test_a_later_chunk_attends_behind_the_earlier_one_which_keeps_its_pace():
    """Halves of one sequence side by side; the first one would be far ahead, its chunk being a tenth."""
    halves = [[Microbatch(0, 0, 10)], [Microbatch(0, 10, 100)]]
    earlier, later = planned(((100,), ()), "per_rank", assignment=halves, num_slots=2)
    attends = [
        [(at, after) for (op, at), (_, after) in zip(of, of[1:]) if op.kind is ATTEND] for of in (earlier, later)
    ]
    for layer in range(3):
        assert attends[1][layer][0] >= attends[0][layer][1]
        assert layer == 0 or attends[0][layer][0] >= attends[1][layer - 1][1]
    alone, _ = planned(((10,), (90,)), "per_rank", num_slots=2)
    assert earlier[-1][1] > alone[-1][1]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_merging_is_a_stable_sort_by_start(data):
    num_layers, num_waves = data.draw(st.integers(1, 3)), data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    sizes = [num_layers * (1 + 3 * waves) + 1 for waves in num_waves]
    keys = np.full((len(sizes), max(sizes)), -1, np.int64)  # what lies behind a cohort's last operation is nobody's
    entries = []
    for c, size in enumerate(sizes):
        keys[c, :size] = sorted(data.draw(st.lists(st.integers(0, 12), min_size=size, max_size=size)))
        entries += [(int(keys[c, n]), c, n) for n in range(size)]
    order = merge_orders(keys, np.array(num_waves, np.int64), num_layers)
    assert order.dtype == np.int32 and order[:, 1].tolist() == [c for _, c, _ in sorted(entries)]
    for c, waves in enumerate(num_waves):
        of_cohort = order[order[:, 1] == c]
        last = of_cohort[-1].tolist()
        assert last == [FINISH, c, num_layers - 1, 0]
        assert of_cohort[:-1, 2].tolist() == [n for n in range(num_layers) for _ in range(1 + 3 * waves)]
        assert of_cohort[:-1, [0, 3]].tolist() == template(waves) * num_layers


def template(waves):
    """Kind and wave of one layer's operations."""
    found = [[ATTEND, 0], [DISPATCH, 0]]
    for wave in range(waves):
        found += [[DISPATCH, wave + 1]] if wave + 1 < waves else []
        found += [[EXPERTS, wave], [COMBINE, wave]]
    return found


@pytest.mark.parametrize("mode", ["per_rank", "pipelined", "two_batch", "chunked"])
def test_plans_are_ordered_by_these_starts(mode):
    lengths, cost = ((50, 7), (10,), (), (30,)), cost_of(host_ns=3)
    p = plan(Facts(lengths), SHAPE, PlanConfig(mode=mode, moe_max_num_tokens=25, num_slots=2), cost)
    keyed = [(at, op.cohort, n, op) for of_cohort in starts(p, cost) for n, (op, at) in enumerate(of_cohort)]
    assert [op for *_, op in sorted(keyed)] == list(p.ops)
