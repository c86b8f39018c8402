"""The simulator against a naive one, and what must hold of any prediction."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.plan.cost import AttendCost, CostModel, ExchangeCost, ExpertsCost, HostCost, SharingCost
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape, OpKind, PlanConfig
from pipemoe.plan.simulator import simulate
from tests.plan.cases import SHAPE, all_facts, assignments, configs
from tests.plan.naive_simulator import COMPUTE, NaiveSimulator

FREE = SharingCost(capacity_permille=10**9, slowdown_permille=0, link_permille=10**9)
SIDE_BY_SIDE = {OpKind.ATTEND: "compute", OpKind.EXPERTS: "compute", OpKind.FINISH: "compute", OpKind.DISPATCH: "dispatch", OpKind.COMBINE: "combine"}


@st.composite
def small_costs(draw, sharing=st.just(FREE)):
    def ns(most=40, least=1):
        return draw(st.integers(least, most))

    attend = ns()
    return CostModel(
        attend=AttendCost(ns(), ns(), ns(2000), ns(2000)),
        experts=ExpertsCost(ns(), ns(5, 0), ns(2000), ns(500), ns(8)),
        dispatch=ExchangeCost(ns(), ns(9, 0), ns(3000, 0)),
        combine=ExchangeCost(ns(), ns(9, 0), ns(3000, 0)),
        host=HostCost(attend, ns(100, 0), ns(attend), *(ns() for _ in range(6))),
        sharing=draw(sharing),
        finish_ns=ns(),
    )


sharings = st.builds(
    SharingCost,
    capacity_permille=st.sampled_from((500, 1000, 2000)),
    slowdown_permille=st.sampled_from((0, 100, 1000)),
    priority=st.integers(0, 1),
    across_ranks=st.integers(0, 1),
    link_permille=st.sampled_from((500, 1000, 4000)),
    exchange_slowdown_permille=st.sampled_from((0, 500)),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_same_as_the_naive_simulator(data):
    facts = data.draw(all_facts(max_ranks=4))
    config = data.draw(configs(facts, modes=("pipelined", "per_rank", "two_batch", "broadcast", "padded")))
    free = config.mode in ("pipelined", "per_rank")
    cost = data.draw(small_costs())
    p = plan(facts, SHAPE, config, cost, assignment=data.draw(assignments(facts)) if free else None)
    if len(p) > 400:
        return
    found = simulate(p, cost)
    if not p.cohorts:
        assert found.ttft == (None,) * facts.num_ranks
        return
    finish = NaiveSimulator(p, cost).run()
    last = {(m.rank, m.stop): c for c, cohort in enumerate(p.cohorts) for m in cohort.microbatches}
    for rank, tokens in enumerate(facts.tokens):
        if tokens:
            assert found.sequence_ttft[rank][-1] == finish[last[rank, tokens]][rank]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_lanes_run_one_thing_at_a_time_and_dependencies_hold(data):
    facts = data.draw(all_facts(max_ranks=5))
    cost = data.draw(small_costs(sharings))
    p = plan(facts, SHAPE, data.draw(configs(facts)), cost)
    found = simulate(p, cost, spans=True)
    for spans in found.spans:
        lanes: dict = {}
        for op, (begin, end) in spans:
            assert begin <= end
            lanes.setdefault((p.cohorts[op.cohort].slot, SIDE_BY_SIDE[op.kind]), []).append((begin, end))
        for of_lane in lanes.values():
            of_lane.sort()
            assert all(a[1] <= b[0] for a, b in zip(of_lane, of_lane[1:]))
        at = dict(spans)
        for op, (begin, _) in spans:
            if op.kind is OpKind.EXPERTS:
                assert begin >= at[op._replace(kind=OpKind.DISPATCH)][1]
            if op.kind is OpKind.COMBINE:
                assert begin >= at[op._replace(kind=OpKind.EXPERTS)][1]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_faster_than_the_work_of_the_busiest_rank(data):
    facts = data.draw(all_facts(max_ranks=4))
    cost = data.draw(small_costs(st.just(SharingCost(slowdown_permille=0))))
    p = plan(facts, SHAPE, data.draw(configs(facts)), cost)
    if not p.cohorts:
        return
    found = simulate(p, cost, spans=True)
    free = simulate(p, replace(cost, sharing=FREE), spans=True)
    end = max(e for spans in found.spans for _, (_, e) in spans)
    alone = max(sum(e - b for op, (b, e) in spans if op.kind in COMPUTE and op.cohort == 0) for spans in free.spans)
    assert end >= alone


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 6), small_costs(sharings))
def test_one_cohort_takes_longer_with_more_tokens(few, more, num_ranks, cost):
    few, more = sorted((few, more))
    config = PlanConfig(mode="broadcast")
    times = [simulate(plan(Facts(((n,), *((7,),) * (num_ranks - 1))), SHAPE, config, cost), cost).makespan for n in (few, more)]
    assert times[0] <= times[1]


def test_contention_slows():
    facts, config = Facts(((400,),) * 4), PlanConfig(mode="per_rank")
    busy = CostModel(host=HostCost(1, 1, 1, 1, 1, 1, 1))
    times = []
    for slowdown in (0, 500, 1000):
        cost = replace(busy, sharing=SharingCost(slowdown_permille=slowdown))
        times.append(simulate(plan(facts, SHAPE, config, cost), cost).makespan)
    assert times[0] < times[1] < times[2]


def test_a_short_cohort_does_not_wait_for_a_long_one():
    facts, cost = Facts(((4096,), (16,), (16,), (16,))), CostModel(host=HostCost(*(5000,) * 7))
    shape = ModelShape(2048, 768, 128, 8, 24)
    two = simulate(plan(facts, shape, PlanConfig(mode="pipelined"), cost), cost)
    one = simulate(plan(facts, shape, PlanConfig(mode="broadcast"), cost), cost)
    assert two.ttft[1] < one.ttft[1] and two.mean < one.mean


def test_predictions_are_deterministic():
    facts, cost = Facts(((300, 20), (7,), ())), CostModel()
    p = plan(facts, SHAPE, PlanConfig(mode="per_rank", moe_max_num_tokens=50), cost)
    assert simulate(p, cost, spans=True) == simulate(p, cost, spans=True)
