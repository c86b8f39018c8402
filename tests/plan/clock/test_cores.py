"""Ranks that share cores and memory: whose turn it is, and what padding costs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.plan.clock.prediction import costs_of, simulate
from pipemoe.plan.clock.rules import COHORT, STATE, core_shares
from pipemoe.plan.config import MODES, PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import cpu
from pipemoe.plan.cost.dimensions import Dimensions
from pipemoe.plan.cost.model import CoresCost, CostModel, HostCost, rates_of
from pipemoe.plan.cost.tuned import LEAST_SHARE
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts
from tests.plan.cases import SHAPE

DIMENSIONS = Dimensions(SHAPE, dense_weights=40_000, pair_flops=600)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.none() | st.integers(1, 1000), min_size=4, max_size=4), min_size=1, max_size=5),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.sampled_from((500, 1000, 2000, 7000)),
)
def test_earlier_slots_have_the_cores_first(demands, slots, permille):
    """demands [rank][cohort], None where nothing is computed."""
    state = np.zeros((len(demands), 4), STATE).view(np.recarray)
    cohorts = np.zeros(4, COHORT).view(np.recarray)
    cohorts["slot"] = slots
    for r, of_rank in enumerate(demands):
        for c, demand in enumerate(of_rank):
            state[r, c]["active"], state[r, c]["demand"] = demand is not None, demand or 77
    rates = rates_of(CostModel(cores=CoresCost(permille)))
    shares = np.empty(3, np.int64)
    core_shares(state, cohorts, np.ones(len(demands), np.int64), rates, shares)
    left = permille
    for slot in range(3):
        wanted = sum(d for of_rank in demands for c, d in enumerate(of_rank) if d is not None and slots[c] == slot)
        given_to_it = max(left, permille * LEAST_SHARE // 1000)
        assert shares[slot] == (1000 if wanted <= given_to_it else 1000 * given_to_it // wanted)
        left = max(0, left - wanted)


def test_a_long_cohort_does_not_slow_a_short_one_on_full_cores():
    host = HostCost(1, 1, 1, 1, 1, 1, 1)
    cost = CostModel(host=host, cores=CoresCost(1000, 0))
    config = PlanConfig(mode="pipelined")
    both = simulate(plan(Facts(((5000,), (16,))), SHAPE, config, cost), cost).ttft
    short = simulate(plan(Facts(((), (16,))), SHAPE, config, cost), cost).ttft
    assert short[1] <= both[1] < 1.2 * short[1]


@pytest.mark.parametrize("lengths", [((4000,), (3, 2), ()), ((700,), (700,), (700,))])
def test_padding_is_free_where_ranks_share_memory(lengths):
    apart = CostModel(host=HostCost(1, 1, 1, 1, 1, 1, 1))
    on_cores = replace(apart, cores=CoresCost(2000))

    def takes(mode, cost):
        return simulate(plan(Facts(lengths), SHAPE, PlanConfig(mode=mode), cost), cost).ttft

    assert takes("padded", on_cores) == takes("broadcast", on_cores)
    assert takes("padded", apart) != takes("broadcast", apart)


@pytest.mark.parametrize("mode", MODES)
def test_slower_cores_take_longer_in_all(mode):
    def cost(slowness):
        return default_cost(cpu(2), DIMENSIONS, 3, value_bytes=4, sum_bytes=4, slowness=slowness)

    facts, config = Facts(((500,), (20, 3), ())), PlanConfig(mode=mode, moe_max_num_tokens=128)
    usual, twice = cost(1000), cost(2000)
    plans = [plan(facts, SHAPE, config, c) for c in (usual, twice)]
    assert plans[0].cohorts == plans[1].cohorts
    for c in (usual, twice):
        assert (costs_of(plans[0], c).compute >= 0).all()
    found = [simulate(plans[0], c).makespan for c in (usual, twice)]
    assert found[1] == pytest.approx(2 * found[0], rel=0.01)


@pytest.mark.parametrize("slowness", [0, 1, 10**9])
def test_absurd_speeds_leave_costs_that_can_be_planned_by(slowness):
    cost = default_cost(cpu(2), DIMENSIONS, 3, value_bytes=4, sum_bytes=4, slowness=slowness)
    assert replace(cost)  # all fields are within bounds
    assert simulate(plan(Facts(((50,), (3,), ())), SHAPE, PlanConfig(mode="pipelined"), cost), cost).makespan >= 0
