"""The price of a layer, by hand, and which attention waits for which."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.plan.clock.layer import (
    COMBINE,
    DISPATCH,
    layer_costs,
    merge_alike_ranks,
)
from pipemoe.plan.clock.prediction import costs_of
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import AttendCost, CostModel, ExchangeCost, ExpertsCost, HostCost, SmsCost, rates_of
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, Microbatch
from pipemoe.plan.waits import LAYER_BEFORE, LAYER_OF, attention_waits
from tests.plan.cases import SHAPE, all_facts, assignments, configs

# A ns for each pair of a query and a key, or each row moved; nothing for anything else.
PAIRS = CostModel(attend=AttendCost(0, 0, 0, 1_000_000), host=HostCost(*(0,) * 9))
ROWS = CostModel(dispatch=ExchangeCost(0, 0, 1_000), combine=ExchangeCost(0, 0, 1_000))


def planned(lengths, mode="broadcast", assignment=None, cost=PAIRS, **options):
    return plan(
        Facts(lengths), SHAPE, PlanConfig(mode=mode, max_tokens_per_rank=1000, **options), cost, assignment=assignment
    )


def attends(p, cost=PAIRS):
    """[C][R]: ns of the attention of a layer."""
    return costs_of(p, cost).compute[:, :, 0, 0].tolist()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_attention_waits_for_earlier_chunks_and_is_paced_by_later_ones(data):
    facts = data.draw(all_facts(max_ranks=4))
    config = data.draw(configs(facts, modes=("per_rank", "pipelined"), most_waves=4))
    p = plan(facts, SHAPE, config, assignment=data.draw(assignments(facts)))
    if not p.cohorts:
        return
    cohorts = range(len(p.cohorts))

    def reads(c, e):
        """Does some chunk of cohort c continue a sequence of which cohort e holds an earlier token?"""
        return any(
            m.rank == n.rank and start < m.start < stop and n.start < min(m.start, stop) and n.stop > start
            for m in p.cohorts[c].microbatches
            for start, stop in zip(facts.boundaries[m.rank], facts.boundaries[m.rank][1:])
            for n in p.cohorts[e].microbatches
        )

    read = [[e for e in cohorts if e != c and reads(c, e)] for c in cohorts]
    assert p.causal_predecessors == tuple(map(tuple, read))
    paced = [[e for e in cohorts if c in read[e] and e // config.num_slots == c // config.num_slots] for c in cohorts]
    assert p.pacemakers == tuple(map(tuple, paced))


def test_attention_waits_for_chunks_of_its_own_sequence_alone():
    """The second sequence is in cohorts 1 and 2, the first in cohort 0. With two slots, 2 has a turn of its own."""
    table = np.array([(0, 0, 0, 4), (1, 0, 4, 7), (2, 0, 7, 10)], dtype=np.int64)
    bounds = Facts(((4, 6),)).flat_boundaries
    assert attention_waits(table, 3, *bounds, 2).tolist() == [[0, 0, 0], [0, 0, 0], [0, LAYER_OF, 0]]
    assert attention_waits(table, 3, *bounds, 3).tolist() == [[0, 0, 0], [0, 0, LAYER_BEFORE], [0, LAYER_OF, 0]]


def test_ranks_in_other_waves_are_not_alike():
    _, weight, _ = merged(((10,),) * 6, "chunked", moe_max_num_tokens=20)
    assert weight.tolist() == [2, 2, 2]


def test_attention_reads_all_earlier_tokens_of_the_sequence():
    assert attends(planned(((10,), (3, 4), ()))) == [[55, 6 + 10, 0]]
    thirds = [
        [Microbatch(0, 0, 4), Microbatch(1, 0, 5)],
        [Microbatch(0, 4, 9)],
        [Microbatch(0, 9, 10), Microbatch(1, 5, 7)],
    ]
    p = planned(((10,), (3, 4)), "per_rank", thirds)
    assert attends(p) == [[10, 6 + 3], [45 - 10, 0], [10, 10 - 3]]
    assert costs_of(p, PAIRS).ends.tolist() == [[0, 1], [0, 0], [1, 1]]


def test_the_first_layers_attention_comes_on_top():
    cost = replace(PAIRS, attend=replace(PAIRS.attend, fixed_ns=7, first_pair_fs=2_000_000))
    costs = costs_of(planned(((10,), ()), cost=cost), cost)
    assert costs.compute[0, :, -1, :].tolist() == [[7 + 3 * 55, 3 * 55], [0, 0]] and costs.compute[0, 0, 0, 0] == 7 + 55


def test_a_crowd_slows_attention_by_what_the_others_do():
    """By half of the smaller of its own and the others' mean."""
    cost = replace(PAIRS, attend=replace(PAIRS.attend, crowd_permille=500))
    assert attends(planned(((10,), (4,), ()), cost=cost), cost) == [[55 + 10 // 4, 10 + 10 // 2, 0]]
    assert attends(planned(((10,),), cost=cost), cost) == [[55]]


def exchanges(p, cost=ROWS):
    """Per wave of the first cohort: ns of dispatch and combine."""
    return [
        tuple(costs_of(p, cost).exchange[0, side, w, 0].tolist() for side in (DISPATCH, COMBINE))
        for w in range(len(p.cohorts[0].waves))
    ]


def test_rows_moved_by_every_form():
    lengths = ((10,), (2, 4), (7,))
    assert exchanges(planned(lengths)) == [(23 - 6, 23)]  # not the rows of the least sender; all sums
    assert exchanges(planned(lengths, "padded")) == [(30 - 10, 30 - 10)]
    assert exchanges(planned(lengths, combine="gather")) == [(23 - 6, 2 * 10)]  # the longest owner has two peers'
    assert exchanges(planned(lengths, "padded", combine="gather")) == [(30 - 10, 2 * 10)]
    assert exchanges(planned(((10,), (), (7,)))) == [(17, 17)]  # nobody's are left out where a rank has none
    assert exchanges(planned(lengths, "chunked", moe_max_num_tokens=8)) == [(8, 8)] * 2 + [
        (7, 7)
    ]  # a wave of two ranks, and no third


def test_calls_are_counted():
    cost = CostModel(dispatch=ExchangeCost(1000, 10, 0), combine=ExchangeCost(2000, 20, 0))
    lengths = ((10,), (2, 4), (7,))
    assert exchanges(planned(lengths, cost=cost), cost) == [(1030, 2060)]
    assert exchanges(planned(lengths, "padded", cost=cost), cost) == [(1010, 2020)]
    assert exchanges(planned(lengths, "padded", cost=cost, combine="gather"), cost) == [(1010, 2060)]


def test_experts_that_leave_multiprocessors_take_longer():
    cost = CostModel(experts=ExpertsCost(0, 0, 9_000, 0, 1), sms=SmsCost(num_sms=132))
    p = planned(((100,), (60,)), cost=cost)
    whole = costs_of(p, cost)
    left = costs_of(replace(p, sms_left=33), cost)
    assert (
        left.compute[0, 0, 1, 0] == pytest.approx(whole.compute[0, 0, 1, 0] * 132 / 99, abs=1)
        and left.compute[0, 0, 0, 0] == whole.compute[0, 0, 0, 0]
    )


def merged(lengths, mode, on_cores=False, cost=PAIRS, **options):
    p = planned(lengths, mode, cost=cost, **options)
    return (*merge_alike_ranks(costs_of(p, cost), on_cores), p)


def test_alike_ranks_are_one_that_stands_for_all():
    costs, weight, p = merged(((100,), (4,), (101, 1), (4,), ()), "pipelined")
    assert weight.tolist() == [2, 2, 1]  # the long ones, the short ones, the one without
    whole = costs_of(p, PAIRS)
    assert costs.ends.tolist() == [[0, 2, 0], [3, 0, 0]]
    assert costs.compute[1, 0].tolist() == whole.compute[1, 2].tolist()  # the longer one of the two
    assert costs.own[:, :, 0].tolist() == [[False, True, False], [True, False, False]]


def test_unlike_ranks_are_merged_only_where_there_are_more_than_three():
    lengths = tuple((n,) for n in (10, 20, 30, 40, 50))
    for count, on_cores, wanted in ((3, False, [1, 1, 1]), (5, False, [5]), (5, True, [1] * 5)):
        costs, weight, p = merged(lengths[:count], "broadcast", on_cores)
        assert weight.tolist() == wanted and costs.ends.sum() == count
        if len(wanted) == 1:
            assert costs.compute[0, 0, 0, 0] == 50 * 51 // 2


def test_pricing_takes_segments_in_any_number_of_waves():
    """As costs_of does it, called by hand: two waves of one cohort, a rank in both."""
    segments = np.array([(0, 0, 1, 0, 3), (0, 1, 1, 3, 4), (0, 1, 0, 0, 2)], dtype=np.int64)
    starts, first = Facts(((2,), (4,))).flat_boundaries
    zero = np.zeros((1, 1), np.int64)
    costs = layer_costs(
        segments, np.array([[3, 3]]), np.array([2]), zero, starts, first, rates_of(ROWS), 8, 2, False, 0, 0
    )
    assert costs.own[0].tolist() == [[False, True], [True, True]] and costs.exchange[0, DISPATCH, :, 1].tolist() == [
        3,
        2,
    ]
