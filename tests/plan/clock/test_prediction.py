"""The simulator against a naive one, and what must hold of any prediction."""

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.plan.clock.prediction import costs_of, simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import (
    AttendCost,
    ContentionCost,
    CoresCost,
    CostModel,
    ExchangeCost,
    ExpertsCost,
    HostCost,
    SmsCost,
)
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape, OpKind
from tests.plan.cases import SHAPE, all_facts, assignments, configs
from tests.plan.clock.naive_clock import COMPUTE, NaiveSimulator

NAMES = [f.name for f in fields(ContentionCost)]
FREE = ContentionCost(**dict.fromkeys(NAMES, 1000))
SIDE_BY_SIDE = {
    OpKind.ATTEND: "compute",
    OpKind.EXPERTS: "compute",
    OpKind.FINISH: "compute",
    OpKind.DISPATCH: "dispatch",
    OpKind.COMBINE: "combine",
}


@st.composite
def small_costs(draw, contention=st.just(FREE), cores=st.just(CoresCost())):
    def ns(most=40, least=1):
        return draw(st.integers(least, most))

    attend = ns()
    return CostModel(
        attend=AttendCost(ns(), ns(), ns(2000), ns(2000), ns(500, 0), ns(60, 0), ns(4000, 0), ns(4000, 0)),
        experts=ExpertsCost(ns(), ns(5, 0), ns(2000), ns(500), ns(8)),
        dispatch=ExchangeCost(ns(), ns(9, 0), ns(3000, 0)),
        combine=ExchangeCost(ns(), ns(9, 0), ns(3000, 0)),
        host=HostCost(attend, ns(100, 0), ns(attend), *(ns() for _ in range(6))),
        cores=draw(cores),
        contention=draw(contention),
        sms=SmsCost(crowded_experts_permille=1000),
        start_ns=0,
        finish_ns=ns(),
    )


contentions = st.builds(ContentionCost, **{name: st.sampled_from((100, 500, 900, 1000)) for name in NAMES})
all_cores = st.builds(
    CoresCost, permille=st.sampled_from((0, 500, 2000)), slowdown_permille=st.sampled_from((0, 100, 1000))
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_same_as_the_naive_simulator(data):
    facts = data.draw(all_facts(max_ranks=4))
    modes = ("pipelined", "per_rank", "two_batch", "chunked", "broadcast", "padded")
    config = data.draw(configs(facts, modes, most_waves=6))
    free = config.mode in ("pipelined", "per_rank")
    cost = data.draw(small_costs())
    p = plan(facts, SHAPE, config, cost, assignment=data.draw(assignments(facts)) if free else None)
    check_against_the_naive_simulator(p, cost)


def check_against_the_naive_simulator(p, cost):
    """All that every rank does, from when to when."""
    facts = p.facts
    found = simulate(p, cost, spans=True)
    if not p.cohorts:
        assert found.ttft == (None,) * facts.num_ranks
        return
    naive = NaiveSimulator(p, cost)
    finish = naive.run()
    assert found.spans == naive.spans
    assert simulate(p, cost, spans=[0]).spans == (naive.spans[0], *[()] * (facts.num_ranks - 1))
    last = {(m.rank, m.stop): c for c, cohort in enumerate(p.cohorts) for m in cohort.microbatches}
    for rank, tokens in enumerate(facts.tokens):
        if tokens:
            assert found.sequence_ttft[rank][-1] == finish[last[rank, tokens]][rank]


def buffer_before(p, op):
    """The operation of the wave that had this one's buffer, or None."""
    waves = len(p.cohorts[op.cohort].waves)
    layer, wave = divmod(op.layer * waves + op.wave - p.config.num_buffers, waves)
    return op._replace(layer=layer, wave=wave) if layer >= 0 else None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_lanes_run_one_thing_at_a_time_and_dependencies_hold(data):
    facts = data.draw(all_facts(max_ranks=5))
    cost = data.draw(small_costs(contentions, all_cores))
    p = plan(facts, SHAPE, data.draw(configs(facts, most_waves=8)), cost)
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
        for op, (begin, end) in spans:
            if op.kind is OpKind.EXPERTS:
                dispatched = at[op._replace(kind=OpKind.DISPATCH)][1]
                assert begin >= dispatched
                assert at[op._replace(kind=OpKind.COMBINE)][0] >= at[op][1]
                if (earlier := buffer_before(p, op)) is not None:
                    assert end >= at[earlier._replace(kind=OpKind.COMBINE)][1]
            elif op.kind is OpKind.DISPATCH and (earlier := buffer_before(p, op)) is not None:
                assert begin >= at[earlier._replace(kind=OpKind.EXPERTS)][1]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_faster_than_the_work_of_the_busiest_rank(data):
    facts = data.draw(all_facts(max_ranks=4))
    cost = data.draw(small_costs(contentions))
    p = plan(facts, SHAPE, data.draw(configs(facts, most_waves=8)), cost)
    if not p.cohorts:
        return
    found = simulate(p, cost, spans=True)
    free = simulate(p, replace(cost, contention=FREE), spans=True)
    end = max(e for spans in found.spans for _, (_, e) in spans)
    alone = max(sum(e - b for op, (b, e) in spans if op.kind in COMPUTE and op.cohort == 0) for spans in free.spans)
    assert end >= alone


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 6), small_costs(contentions, all_cores))
def test_one_cohort_takes_longer_with_more_tokens(few, more, num_ranks, cost):
    few, more = sorted((few, more))
    config = PlanConfig(mode="broadcast")
    times = [
        simulate(plan(Facts(((n,), *((7,),) * (num_ranks - 1))), SHAPE, config, cost), cost).makespan
        for n in (few, more)
    ]
    assert times[0] <= times[1]


def test_contention_slows():
    facts, config = Facts(((400,),) * 4), PlanConfig(mode="per_rank")
    busy = CostModel(host=HostCost(1, 1, 1, 1, 1, 1, 1))
    slow = {name: 100 for name in NAMES}
    costs = [replace(busy, contention=FREE), busy, replace(busy, contention=ContentionCost(**slow))]
    costs += [replace(busy, contention=FREE, cores=CoresCost(2000, slowdown)) for slowdown in (0, 500, 1000)]
    times = [simulate(plan(facts, SHAPE, config, cost), cost).makespan for cost in costs]
    assert times[0] < times[1] < times[2] and times[0] < times[3] < times[4] < times[5]


def test_only_what_runs_beside_it_slows_an_operation():
    """One cohort in one wave: nothing is ever beside anything."""
    facts, config = Facts(((400,), (3,), ())), PlanConfig(mode="broadcast")
    slow = CostModel(contention=ContentionCost(**dict.fromkeys(NAMES, 100)))
    free = replace(slow, contention=FREE)
    assert simulate(plan(facts, SHAPE, config, slow), slow) == simulate(plan(facts, SHAPE, config, free), free)


def test_the_second_slot_is_under_the_first():
    """Two ranks' cohorts compute side by side; what the second one suffers costs the first nothing."""
    facts, config = Facts(((400,), (500,))), PlanConfig(mode="per_rank")
    base = CostModel(host=HostCost(1, 1, 1, 1, 1, 1, 1), contention=FREE)
    under = replace(
        base, contention=replace(FREE, experts_under_attend=300, attend_under_experts=300, experts_under_experts=300)
    )
    of = {cost: simulate(plan(facts, SHAPE, config, cost), cost).ttft for cost in (base, under)}
    assert of[under][1] > of[base][1] and of[under][0] <= of[base][0] * 1.01


def test_a_dispatch_costs_what_the_busiest_link_carries():
    """All rows but those of the rank that the link leads to; padding travels."""
    volume = replace(CostModel(), dispatch=ExchangeCost(0, 0, 1000), combine=ExchangeCost(0, 0, 1000))

    def dispatched(tokens, mode):
        p = plan(Facts(tuple((n,) if n else () for n in tokens)), SHAPE, PlanConfig(mode=mode), volume)
        return [costs_of(p, volume).exchange[0, side, 0, 0] for side in (0, 1)]

    assert dispatched((400, 400), "broadcast") == [400, 800] and dispatched((400, 0), "broadcast") == [400, 400]
    assert dispatched((400, 100, 100), "broadcast") == [500, 600] and dispatched((400, 100, 100), "padded") == [
        800,
        800,
    ]
    assert dispatched((400, 400), "auto") == [400, 400] and dispatched((400, 100), "auto") == [400, 500]


@pytest.mark.parametrize("graph_cuts", [0, 1])
def test_cut_sequences_are_attended_by_graphs_that_serve_them(graph_cuts):
    facts, cost = Facts(((64,),) * 2), CostModel(host=HostCost(graph_cuts=graph_cuts))
    whole, cut = (
        costs_of(plan(facts, SHAPE, PlanConfig(mode=mode), cost), cost) for mode in ("broadcast", "two_batch")
    )
    assert whole.issue[0, 0] == cost.host.graph_ns
    assert set(cut.issue.flat) == {cost.host.graph_ns if graph_cuts else cost.host.attend_ns}


def test_a_short_cohort_does_not_wait_for_a_long_one():
    facts, cost = Facts(((4096,), (16,), (16,), (16,))), CostModel(host=HostCost(*(5000,) * 7))
    shape = ModelShape(2048, 768, 128, 8, 24)
    two = simulate(plan(facts, shape, PlanConfig(mode="pipelined"), cost), cost)
    one = simulate(plan(facts, shape, PlanConfig(mode="broadcast"), cost), cost)
    assert two.ttft[1] < one.ttft[1] and two.mean < one.mean


@pytest.mark.parametrize("slow", ["experts", "combine"])
def test_a_buffer_is_used_again_when_its_last_user_is_done_with_it(slow):
    """Four waves in two buffers. What is slow holds up the wave after the next: the others are there long before."""
    nothing = replace(HostCost(*(0,) * 9), graph_rows=0)
    experts = ExpertsCost(0, 0, 0, 9_000 if slow == "experts" else 0, 1)
    combine = ExchangeCost(0, 0, 9_000 if slow == "combine" else 0)
    dispatch = ExchangeCost(0, 0, 100)
    cost = CostModel(AttendCost(0, 0, 0, 0), experts, dispatch, combine, nothing, contention=FREE, start_ns=0)
    config = PlanConfig(mode="chunked", moe_max_num_tokens=10)
    p = plan(Facts(((25,), (15,))), SHAPE, config, cost)
    check_against_the_naive_simulator(p, cost)
    begins, ends = {}, {}
    for op, (begin, end) in simulate(p, cost, spans=True).spans[0]:
        begins.setdefault(op, begin)
        ends[op] = end
    # Experts read the receive buffer, and write sums where the combine of the wave before the last still sends.
    held, by = (OpKind.DISPATCH, OpKind.EXPERTS) if slow == "experts" else (OpKind.EXPERTS, OpKind.COMBINE)
    for op in p.ops:
        if op.kind is held and op.wave > 1:  # the first two wait for the attention
            assert begins[op] == ends[op._replace(kind=by, wave=op.wave - 2)], op


def test_predictions_are_deterministic():
    facts, cost = Facts(((300, 20), (7,), ())), CostModel()
    p = plan(facts, SHAPE, PlanConfig(mode="per_rank", moe_max_num_tokens=50), cost)
    assert simulate(p, cost, spans=True) == simulate(p, cost, spans=True)
