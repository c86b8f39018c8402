"""How many multiprocessors plans leave to collectives: the usual rule, and what a user demands."""

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.clock.sms import forced_sms_left, possible_sms_left, room_for_collectives
from pipemoe.plan.config import MODES, PlanConfig
from pipemoe.plan.cost.model import ContentionCost, CostModel, ExchangeCost, ExpertsCost, HostCost, SmsCost
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape
from tests.plan.cases import SHAPE, all_facts, configs

DEEP = ModelShape(2048, 768, 128, 8, 24)
FACTS = Facts(((300,), (300,), (40,), (40,)))
FIXED = tuple(mode for mode in MODES if mode != "auto")
sms_costs = st.builds(
    SmsCost, st.sampled_from((0, 32, 132)), st.sampled_from((0, 1, 8)), *[st.sampled_from((500, 1000, 1500))] * 4
)


def test_room_is_for_all_collectives_but_a_tenth_at_most():
    assert room_for_collectives(32, 1, 2) == 3 and room_for_collectives(132, 1, 2) == 4
    assert room_for_collectives(132, 8, 4) == room_for_collectives(132, 8, 1) == 13
    assert room_for_collectives(0, 8, 4) == room_for_collectives(132, 0, 4) == 0


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_plans_leave_what_experts_are_made_ready_for(data):
    facts = data.draw(all_facts(max_ranks=6))
    config = replace(data.draw(configs(facts)), num_sms=None)
    cost = CostModel(sms=data.draw(sms_costs))
    p = plan(facts, SHAPE, config, cost)
    assert p.sms_left in possible_sms_left(config, cost.sms)
    assert p.sms_left == 0 or p.sms_left < cost.sms.num_sms
    if p.cohorts:
        room = room_for_collectives(cost.sms.num_sms, cost.sms.ctas, p.num_slots_used)
        assert p.sms_left == (room if sum(len(cohort.waves) for cohort in p.cohorts) > 1 else 0)


def test_fewer_slots_need_less_room():
    cost = CostModel(sms=SmsCost(num_sms=132, ctas=1))
    left = {mode: plan(FACTS, SHAPE, PlanConfig(mode=mode, moe_max_num_tokens=400), cost).sms_left for mode in FIXED}
    assert left == {"padded": 0, "broadcast": 0, "chunked": 2, "two_batch": 4, "per_rank": 8, "pipelined": 4}


@pytest.mark.parametrize("mode", MODES)
def test_what_a_user_demands_holds_in_every_plan(mode):
    config = PlanConfig(mode=mode, num_sms=100)
    for facts in (FACTS, Facts(((), ()))):
        assert plan(facts, SHAPE, config).sms_left == 32
    assert possible_sms_left(config, SmsCost()) == (32,)


@pytest.mark.parametrize("num_sms, there_are", [(133, 132), (1, 0)])
def test_more_than_there_are_is_refused(num_sms, there_are):
    cost = CostModel(sms=SmsCost(num_sms=there_are))
    for facts in (FACTS, Facts(((), ()))):
        with pytest.raises(ConfigError, match=f"num_sms is {num_sms}, .* can fill {there_are}"):
            plan(facts, SHAPE, PlanConfig(num_sms=num_sms), cost)
    assert forced_sms_left(PlanConfig(num_sms=132), SmsCost()) == 0


def test_digest_tells_plans_apart_that_leave_other_numbers():
    p = plan(FACTS, SHAPE, PlanConfig())
    assert p.digest != replace(p, sms_left=p.sms_left + 1).digest


FREE = ContentionCost(**{f.name: 1000 for f in fields(ContentionCost)})
COMPUTING = CostModel(  # experts take most of the time, and all of that is arithmetic
    experts=ExpertsCost(fixed_ns=1_000, expert_ns=0, pair_ps=50_000, row_ps=0),
    dispatch=ExchangeCost(2_000, 0, 10_000),
    combine=ExchangeCost(2_000, 0, 10_000),
    host=HostCost(*(1_000,) * 9),
    contention=FREE,
)


def test_crowding_and_fewer_multiprocessors_slow():
    facts = Facts(((3000,),) * 4)

    def makespan(num_sms, crowded=1000):
        cost = replace(COMPUTING, sms=SmsCost(132, 8, crowded))
        return simulate(
            plan(facts, DEEP, PlanConfig(mode="chunked", moe_max_num_tokens=4096, num_sms=num_sms), cost), cost
        ).makespan

    assert makespan(132) < makespan(119) < makespan(66)
    assert makespan(132) < makespan(132, 500) and makespan(119) == makespan(119, 500)
