"""Waves that are computed as they arrive: groups, parts, what they are predicted to gain, and when mode auto takes
them.
"""

import importlib.util
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError
from pipemoe.plan.arrivals import MAX_PARTS, OWN, Part, groups_of, parts_of
from pipemoe.plan.auto.choice import auto_candidates, evaluate
from pipemoe.plan.clock.prediction import costs_of, simulate
from pipemoe.plan.config import MODES, PlanConfig
from pipemoe.plan.cost.model import AttendCost, ContentionCost, CostModel, ExchangeCost, ExpertsCost, HostCost, SmsCost
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import MAX_GROUPS, Facts, ModelShape
from pipemoe.plan.verify import verify
from tests.plan.cases import SHAPE, all_facts, configs

FREE = ContentionCost(**{f.name: 1000 for f in fields(ContentionCost)})
DEEP = ModelShape(2048, 768, 128, 8, 24)


def facts_of(*tokens):
    return Facts(tuple((n,) if n else () for n in tokens))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_groups_and_parts(data):
    facts = data.draw(all_facts())
    config = replace(data.draw(configs(facts)), arrivals=True)
    p = plan(facts, SHAPE, config)
    verify(p)
    assert p.arrivals == (len({c.slot for c in p.cohorts}) == 1)
    for c, cohort in enumerate(p.cohorts):
        for w, wave in enumerate(cohort.waves):
            groups = groups_of(p, c, w)
            assert (
                len(groups) <= max(1, len(wave.ranks()) // 2) and len(groups) * min(2, len(cohort.waves)) <= MAX_GROUPS
            )
            assert len(groups) == 1 or p.arrivals
            for rank in range(facts.num_ranks) if p.arrivals else ():
                parts = parts_of(p, c, w, rank)
                own = sum(part.num_rows for part in parts if part.group == OWN)
                assert own >= sum(s.num_rows for s in wave.segments if s.rank == rank) and len(parts) <= len(groups) + 2


def test_groups_hold_about_as_many_rows():
    p = plan(facts_of(*(10,) * 8), SHAPE, PlanConfig(mode="broadcast", max_tokens_per_rank=100, arrivals=True))
    assert [[s.rank for s in group.segments] for group in groups_of(p, 0, 0)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert parts_of(p, 0, 0, 3) == (
        Part(0, 20, 0),
        Part(20, 30, 1),
        Part(30, 40, OWN),
        Part(40, 60, 2),
        Part(60, 80, 3),
    )
    long = plan(facts_of(1, 90, 1, 1), SHAPE, PlanConfig(mode="broadcast", max_tokens_per_rank=100, arrivals=True))
    assert [[s.rank for s in group.segments] for group in groups_of(long, 0, 0)] == [[0, 2, 3], [1]]
    assert parts_of(long, 0, 0, 1) == (Part(0, 3, 0), Part(3, 93, OWN))
    assert len(groups_of(replace(p, arrivals=False), 0, 0)) == 1
    two_waves = plan(facts_of(*(10,) * 16), SHAPE, PlanConfig(mode="chunked", moe_max_num_tokens=80, arrivals=True))
    assert [len(groups_of(two_waves, 0, w)) for w in (0, 1)] == [2, 2]  # the next wave's have room beside them


def test_a_gathered_wave_is_one_group_around_the_own_rows():
    p = plan(facts_of(7, 0, 5), SHAPE, PlanConfig(mode="padded", arrivals=True))
    assert len(groups_of(p, 0, 0)) == 1
    assert [parts_of(p, 0, 0, rank) for rank in range(3)] == [
        (Part(0, 7, OWN), Part(7, 21, 0)),
        (Part(0, 7, 0), Part(7, 14, OWN), Part(14, 21, 0)),
        (Part(0, 14, 0), Part(14, 21, OWN)),
    ]


def test_only_plans_of_one_slot_have_arrivals():
    facts = facts_of(4000, 16, 16)
    for mode in MODES:
        config = PlanConfig(mode=mode, arrivals=True)
        p, one_slot = plan(facts, SHAPE, config), plan(facts, SHAPE, replace(config, num_slots=1))
        assert p.arrivals == (len(p.cohorts) == 1) and one_slot.arrivals, mode
        assert not plan(facts, SHAPE, replace(config, arrivals=None)).arrivals
    assert not plan(facts_of(0, 0), SHAPE, PlanConfig(arrivals=True)).arrivals
    assert plan(facts_of(40), SHAPE, PlanConfig(arrivals=True)).arrivals


def test_experts_tell_as_many_parts_apart():
    if importlib.util.find_spec("numba_cuda") is None:
        pytest.skip("numba-cuda is not installed")
    from pipemoe_kernels.gemm.arrivals import raster

    assert raster.MAX_PARTS == MAX_PARTS


def without_launches(**changes):
    """Experts 9 ns a row and rank (two ranks: one of two pairs is local), of which 300 permille are the output."""
    experts, exchanges = ExpertsCost(0, 0, 0, 9_000, 1, 300, 1000), (ExchangeCost(0, 0, 6_000), ExchangeCost(0, 0, 0))
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
    """By hand: 50 and 50 rows, the broadcasts 300, experts 900, of which 630 are the first GEMM, half of that for own
    rows.
    """
    facts, cost = facts_of(50, 50), without_launches()
    assert makespan(facts, cost, False) == 2 * 1200
    assert makespan(facts, cost, True) == 2 * (315 + 585)  # the rows come at 300, within the own ones' 315
    late = replace(cost, dispatch=ExchangeCost(0, 0, 12_000))
    assert makespan(facts, late, True) == 2 * (600 + 585)  # at 600: the other half and the output are left
    slower = replace(cost, experts=replace(cost.experts, arrivals_permille=500))
    assert makespan(facts, slower, True) == 2 * 2 * 900
    assert makespan(facts, cost, True, mode="padded") == makespan(facts, cost, True)
    # Weights: of few rows each expert's are read for the others' rows again, so nothing can go ahead.
    reading = replace(cost, experts=ExpertsCost(0, 10, 0, 0, 1, 300, 1000))
    assert makespan(facts, reading, True) == makespan(facts, reading, False)


def test_a_dispatch_in_groups_costs_launches_and_links():
    """Four ranks of 50, 50, 50 and 51 rows: two groups carry all rows, one all but those of the last."""
    facts, cost = facts_of(50, 50, 50, 51), without_launches(dispatch=ExchangeCost(7, 3, 1_000))
    p = plan(facts, SHAPE, PlanConfig(mode="broadcast", arrivals=True), cost)
    assert costs_of(p, cost).exchange[0, 0, 0, 0] == 2 * 7 + 4 * 3 + 201 and costs_of(p, cost).groups[0] == 2
    assert costs_of(replace(p, arrivals=False), cost).exchange[0, 0, 0, 0] == 7 + 4 * 3 + 151
    issuing = replace(cost, host=replace(cost.host, dispatch_ns=100_000))
    assert simulate(p, issuing).makespan > simulate(replace(p, arrivals=False), issuing).makespan + 90_000


@pytest.mark.parametrize("tokens", [(3000,) * 4, (4000, 2000, 2500, 1500, 100, 50)])
def test_auto_takes_arrivals_where_that_hides_the_dispatch(tokens):
    host = HostCost(50_000, 10_000, 10_000, 10_000, 10_000, 10_000, 1_000)
    experts, dispatch = ExpertsCost(arrivals_permille=950), ExchangeCost(10_000, 2_000, 60_000)
    cost = CostModel(host=host, contention=FREE, experts=experts, dispatch=dispatch, sms=SmsCost(num_sms=0))
    facts, config = facts_of(*tokens), PlanConfig(moe_max_num_tokens=100_000, num_slots=1)

    def chosen(cost, **options):
        p = plan(facts, DEEP, replace(config, **options), cost)
        verify(p)
        return p.arrivals, simulate(p, cost).makespan

    arrivals, time = chosen(cost)
    assert arrivals and time < 0.98 * chosen(cost, arrivals=False)[1]
    for against in (
        replace(cost, experts=replace(cost.experts, arrivals_permille=0)),
        replace(cost, experts=replace(cost.experts, arrivals_permille=300)),
        replace(cost, dispatch=ExchangeCost(100, 100, 100)),
    ):
        assert not chosen(against)[0]
    assert chosen(replace(cost, experts=replace(cost.experts, arrivals_permille=300)), arrivals=True)[0]
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
    shape, cost = ModelShape(7168, 2048, 256, 8, 61), CostModel(experts=ExpertsCost(arrivals_permille=900))
    config = PlanConfig(moe_max_num_tokens=cap, num_slots=slots)
    assert evaluate(Facts(lengths), shape, config, cost, only_chosen=True)[1] <= 4100


@pytest.mark.parametrize("value", [1, 0, "on"])
def test_bad_settings_are_refused(value):
    with pytest.raises(ConfigError, match="arrivals"):
        PlanConfig(arrivals=value)
    with pytest.raises(ConfigError, match="arrivals_permille"):
        ExpertsCost(arrivals_permille=1001)
