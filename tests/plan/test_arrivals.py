"""Waves that are computed as they arrive: where rows lie, what plans are predicted to gain, and when mode auto takes
them.
"""

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError
from pipemoe.plan.arrivals import own_rows_first
from pipemoe.plan.auto.choice import auto_candidates, evaluate
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import MODES, PlanConfig
from pipemoe.plan.cost.model import AttendCost, ContentionCost, CostModel, ExchangeCost, ExpertsCost, HostCost, SmsCost
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape, Segment
from pipemoe.plan.verify import verify
from tests.plan.cases import SHAPE, all_facts, configs

FREE = ContentionCost(**{f.name: 1000 for f in fields(ContentionCost)})
DEEP = ModelShape(2048, 768, 128, 8, 24)


def facts_of(*tokens):
    return Facts(tuple((n,) if n else () for n in tokens))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_where_rows_lie(data):
    """Each row of a wave at one place, own rows in front, on every rank."""
    facts = data.draw(all_facts())
    config = replace(data.draw(configs(facts)), arrivals=True)
    p = plan(facts, SHAPE, config)
    verify(p)
    assert p.arrivals == (bool(p.cohorts) and config.exchange != "padded")
    for cohort in p.cohorts:
        for wave in cohort.waves:
            for rank in range(facts.num_ranks):
                here, early = own_rows_first(p, wave, rank)
                own = sum(s.num_rows for s in wave.segments if s.rank == rank)
                assert early == (own if p.arrivals and own < wave.num_rows else 0)
                assert [s[:3] for s in here.segments] == [s[:3] for s in wave.segments]
                if early:
                    places = [place for s in here.segments for place in range(s.row, s.row + s.num_rows)]
                    assert sorted(places) == list(range(wave.num_rows))
                    assert {s.rank for s in here.segments if s.row < early} == {rank}
                else:
                    assert here == wave


def test_own_rows_lie_in_front_and_the_others_in_their_order():
    p = plan(facts_of(10, 20, 5, 30), SHAPE, PlanConfig(mode="broadcast", max_tokens_per_rank=100, arrivals=True))
    wave = p.cohorts[0].waves[0]
    assert [(s.rank, s.row) for s in wave.segments] == [(2, 0), (0, 5), (1, 15), (3, 35)]
    here, early = own_rows_first(p, wave, 1)
    assert early == 20 and here.num_rows == 65
    assert here.segments == (Segment(2, 0, 5, 20), Segment(0, 0, 10, 25), Segment(1, 0, 20, 0), Segment(3, 0, 30, 35))
    assert own_rows_first(replace(p, arrivals=False), wave, 1) == (wave, 0)


def test_plans_of_every_mode_but_one_may_have_arrivals():
    for mode in MODES:
        config = PlanConfig(mode=mode, arrivals=True)
        p = plan(facts_of(4000, 16, 16), SHAPE, config)
        assert p.arrivals == (mode != "padded")
        assert not plan(facts_of(4000, 16, 16), SHAPE, replace(config, arrivals=None)).arrivals
    assert not plan(facts_of(0, 0), SHAPE, PlanConfig(arrivals=True)).arrivals
    even = plan(facts_of(40, 40), SHAPE, PlanConfig(arrivals=True))
    assert even.arrivals and even.exchange(even.cohorts[0].waves[0]) == "broadcast"


def without_launches(**changes):
    """Experts 9 ns a row and rank (two ranks: one of two pairs is local), of which 300 permille are the output."""
    experts, exchanges = ExpertsCost(0, 0, 0, 9_000, 1, 300), (ExchangeCost(0, 0, 6_000), ExchangeCost(0, 0, 0))
    cost = CostModel(
        AttendCost(0, 0, 0, 0), experts, *exchanges, HostCost(*(0,) * 9), contention=FREE, start_ns=0, finish_ns=0
    )
    return replace(cost, **changes)


def makespan(facts, cost, arrivals, **options):
    p = plan(
        facts,
        replace(SHAPE, num_layers=2),
        PlanConfig(mode=options.pop("mode", "broadcast"), arrivals=arrivals, **options),
        cost,
    )
    verify(p)
    return simulate(p, cost).makespan


def test_own_rows_are_computed_while_the_others_come():
    """By hand: 50 and 50 rows, the broadcasts 300 ns, experts 450 for each half."""
    facts, cost = facts_of(50, 50), without_launches()
    assert makespan(facts, cost, False) == 2 * 1200
    assert makespan(facts, cost, True) == 2 * 900  # the others' rows come within the own ones' 450
    late = replace(cost, dispatch=ExchangeCost(0, 0, 12_000))
    assert makespan(facts, late, True) == 2 * (600 + 450)
    assert makespan(facts, cost, True, mode="padded") == 2 * 1200
    launches = replace(cost, experts=replace(cost.experts, fixed_ns=100))
    assert makespan(facts, launches, True) == 2 * (550 + 550) and makespan(facts, launches, False) == 2 * (300 + 1000)
    # Each half hits all 4 of a rank's experts, more or less: weights are read twice.
    reading = replace(cost, experts=ExpertsCost(0, 100, 0, 0, 1, 300))
    assert makespan(facts, reading, False) == 2 * (300 + 400) and 2 * 790 < makespan(facts, reading, True) <= 2 * 800


def test_a_rank_without_rows_or_with_all_of_them():
    cost = without_launches()
    assert makespan(facts_of(100, 0), cost, True) == makespan(facts_of(100, 0), cost, False)
    assert makespan(facts_of(100), cost, True) == makespan(facts_of(100), cost, False)


@pytest.mark.parametrize("tokens", [(3000,) * 4, (3000, 2800, 3100, 2950)])
def test_auto_takes_arrivals_where_that_hides_the_dispatch(tokens):
    host = HostCost(50_000, 10_000, 10_000, 10_000, 10_000, 10_000, 1_000)
    experts, dispatch = ExpertsCost(30_000, 500), ExchangeCost(10_000, 2_000, 60_000)
    cost = CostModel(host=host, contention=FREE, experts=experts, dispatch=dispatch, sms=SmsCost(num_sms=0))
    facts, config = facts_of(*tokens), PlanConfig(moe_max_num_tokens=100_000, num_slots=1)

    def chosen(cost, **options):
        p = plan(facts, DEEP, replace(config, **options), cost)
        verify(p)
        return p.arrivals, simulate(p, cost).makespan

    arrivals, time = chosen(cost)
    assert arrivals and time < chosen(cost, arrivals=False)[1]
    for against in (
        replace(cost, experts=replace(experts, expert_ns=200_000)),
        replace(cost, dispatch=ExchangeCost(100, 100, 100)),
    ):
        assert not chosen(against)[0] and chosen(against, arrivals=True)[0]
    forms = {(c.num_column_blocks, c.arrivals) for c in auto_candidates(facts, DEEP, config, cost)}
    assert (1, False) in forms and {arrivals for _, arrivals in forms} == {False, True}


@pytest.mark.parametrize(
    "lengths",
    [((4096,), *((16,),) * 7), ((2048,),) * 8, tuple((100 << i,) for i in range(8)), tuple((i,) for i in range(1, 9))],
)
@pytest.mark.parametrize("cap", [2048, 8192])
@pytest.mark.parametrize("slots", [1, 4])
def test_choosing_takes_a_bounded_number_of_events(lengths, cap, slots):
    """As without arrivals (auto/test_choice.py)."""
    shape = ModelShape(7168, 2048, 256, 8, 61)
    config = PlanConfig(moe_max_num_tokens=cap, num_slots=slots)
    assert evaluate(Facts(lengths), shape, config, CostModel(), only_chosen=True)[1] <= 4100


@pytest.mark.parametrize("value", [1, 0, "on"])
def test_bad_settings_are_refused(value):
    with pytest.raises(ConfigError, match="arrivals"):
        PlanConfig(arrivals=value)
