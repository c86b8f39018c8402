"""Mode auto: sound plans for any counts, the same on every rank, the best of what was looked at."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError
from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.auto.candidates import fixed_assignment
from pipemoe.plan.auto.choice import auto_assignment, auto_candidates, evaluate
from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import COMBINES, OBJECTIVES, PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS, cpu
from pipemoe.plan.cost.model import CostModel, ExchangeCost, HostCost, SmsCost
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape
from pipemoe.plan.verify import verify

SHAPE = ModelShape(1024, 32, 8, 2, 2)
DEEP = ModelShape(2048, 768, 128, 8, 24)
QUICK_HOST = CostModel(host=HostCost(50_000, 10_000, 10_000, 10_000, 10_000, 10_000, 1_000))  # launches do not bind

SLOW_LINKS = replace(QUICK_HOST, dispatch=ExchangeCost(20_000, 5_000, 100_000))


@st.composite
def wide_facts(draw):
    """1 to 16 ranks with 0 to 100,000 tokens each, in a few sequences."""
    ranks = []
    for _ in range(draw(st.integers(1, 16))):
        total = draw(st.one_of(st.just(0), st.integers(1, 100), st.integers(0, 10**5)))
        lengths = []
        while total and len(lengths) < 4:
            lengths.append(draw(st.integers(1, total)))
            total -= lengths[-1]
        ranks.append(tuple(lengths + ([total] if total else [])))
    return Facts(tuple(ranks))


@st.composite
def wide_configs(draw):
    return PlanConfig(
        moe_max_num_tokens=draw(st.integers(4096, 200_000)),
        max_tokens_per_rank=10**5,
        num_slots=draw(st.integers(1, 8)),
        combine=draw(st.sampled_from(COMBINES)),
        objective=draw(st.sampled_from(OBJECTIVES)),
        makespan_budget=draw(st.sampled_from((0, 0.1, 1.0))),
    )


def plan_of(candidate, facts, shape, config, cost):
    num_sms = cost.sms.num_sms - candidate.sms_left if cost.sms.num_sms else None
    return plan(facts, shape, replace(config, num_sms=num_sms), cost, assignment=candidate.assignment)


costs = st.sampled_from(
    [CostModel(), CostModel(host=HostCost(1, 1, 1, 1, 1, 1, 1)), SLOW_LINKS]
    + [
        default_cost(device, dimensions_of(MODEL_CONFIGS["small"]), 4, value_bytes=2, sum_bytes=4, ctas=1)
        for device in (*GPUS.values(), cpu(2))
    ]
    + [CostModel(sms=SmsCost(132, 1, 900, 900, 1200, 1200))]
)


@settings(max_examples=120, deadline=None)
@given(wide_facts(), wide_configs(), costs)
def test_every_plan_verifies(facts, config, cost):
    verify(plan(facts, SHAPE, config, cost))


@settings(max_examples=60, deadline=None)
@given(wide_facts(), wide_configs(), costs)
def test_every_candidate_verifies_and_one_is_chosen(facts, config, cost):
    candidates = auto_candidates(facts, SHAPE, config, cost)
    assert sum(c.chosen for c in candidates) == (1 if any(facts.tokens) else 0)
    for candidate in candidates:
        verify(plan_of(candidate, facts, SHAPE, config, cost))
    chosen = next((c for c in candidates if c.chosen), None)
    if chosen is not None:  # also by what skips all that cannot be chosen
        assert (chosen.assignment, chosen.sms_left) == auto_assignment(facts, SHAPE, config, cost)


@settings(max_examples=100, deadline=None)
@given(wide_facts(), wide_configs(), costs)
def test_planning_is_deterministic(facts, config, cost):
    again = Facts(tuple(tuple(lengths) for lengths in facts.lengths))
    assert plan(facts, SHAPE, config, cost).digest == plan(again, SHAPE, config, cost).digest


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8), costs)
def test_shallow_models_are_predicted_as_simulated(tokens, cost):
    """Up to the merging of ranks."""
    facts = Facts(tuple((n,) if n else () for n in tokens))
    for candidate in auto_candidates(facts, SHAPE, PlanConfig(), cost):
        found = simulate(plan_of(candidate, facts, SHAPE, PlanConfig(), cost), cost)
        assert candidate.slowest == pytest.approx(found.makespan, rel=0.3)


USUAL = [(4096, 16, 16, 16), (2048,) * 4, (8192, 1024, 512, 0), (64,) * 4, (5000, 300, 40, 900), (374, 396, 879, 91)]


@pytest.mark.parametrize("tokens", USUAL)
def test_deep_models_are_predicted_from_few_layers(tokens):
    facts, cost = Facts(tuple((n,) if n else () for n in tokens)), CostModel()
    for candidate in auto_candidates(facts, DEEP, PlanConfig(), cost):
        found = simulate(plan_of(candidate, facts, DEEP, PlanConfig(), cost), cost)
        assert candidate.slowest == pytest.approx(found.makespan, rel=0.2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tokens", USUAL)
def test_no_worse_than_a_fixed_mode_by_its_own_prediction(tokens, objective):
    """But for what each extra cohort must buy. per_rank is not among the candidates: it never paid."""
    facts, cost = Facts(tuple((n,) if n else () for n in tokens)), CostModel()
    config = PlanConfig(objective=objective)

    def figure(c):
        return {"mean": c.mean, "slowest": c.slowest, "p50": c.p50}[objective]

    candidates = auto_candidates(facts, DEEP, config, cost)
    chosen = next(c for c in candidates if c.chosen)
    allowed = min(c.slowest for c in candidates) * (1 + config.makespan_budget)
    assert chosen.slowest <= allowed * 1.001
    for mode in ("chunked", "two_batch", "pipelined"):
        assignment = fixed_assignment(facts, replace(config, mode=mode))
        same = [c for c in candidates if sorted(map(sorted, c.assignment)) == sorted(map(sorted, assignment))]
        assert same, f"{mode} is not among the candidates"
        if same[0].slowest <= allowed:
            assert figure(chosen) <= figure(same[0]) * 1.05


@pytest.mark.parametrize(
    "lengths",
    [((4096,), *((16,),) * 7), ((2048,),) * 8, tuple((100 << i,) for i in range(8)), tuple((i,) for i in range(1, 9))],
)
@pytest.mark.parametrize("cap", [2048, 8192])
def test_choosing_takes_a_bounded_number_of_events(lengths, cap):
    """8 ranks, 61 layers: some 4,000 events are a millisecond."""
    shape = ModelShape(7168, 2048, 256, 8, 61)
    config = PlanConfig(moe_max_num_tokens=cap)
    assert evaluate(Facts(lengths), shape, config, CostModel(), only_chosen=True)[1] <= 4100


def test_short_prompts_are_freed_from_a_long_one():
    facts = Facts(((4096,), (16,), (16,), (16,)))
    p = plan(facts, DEEP, PlanConfig(makespan_budget=0.3), QUICK_HOST)
    assert len(p.cohorts) > 1 and {m.rank for m in p.cohorts[0].microbatches} == {1, 2, 3}
    assert (
        simulate(p, QUICK_HOST).ttft[1]
        < simulate(plan(facts, DEEP, PlanConfig(mode="broadcast"), QUICK_HOST), QUICK_HOST).ttft[1]
    )


@pytest.mark.parametrize("tokens", [(64,) * 4, (1, 0, 0, 0)])
def test_small_steps_stay_together(tokens):
    facts = Facts(tuple((n,) if n else () for n in tokens))
    assert len(plan(facts, DEEP, PlanConfig(), CostModel()).cohorts) == 1


def test_short_sequences_leave_a_long_one_of_their_rank():
    facts = Facts(((16, 8000, 16), (16,), (16,), (16,)))
    p = plan(facts, DEEP, PlanConfig(makespan_budget=1.0), QUICK_HOST)
    assert [m[:] for m in p.cohorts[0].microbatches if m.rank == 0] == [(0, 0, 16), (0, 8016, 8032)]


def test_objectives_and_budget_matter():
    facts = Facts(((4096,), (16,), (16,), (16,)))

    def chosen(**options):
        return next(c for c in auto_candidates(facts, DEEP, PlanConfig(**options), QUICK_HOST) if c.chosen)

    slowest, mean = chosen(objective="slowest"), chosen(makespan_budget=10.0)
    assert slowest.slowest <= mean.slowest and mean.mean < slowest.mean
    assert chosen(makespan_budget=10.0, objective="p50").p50 <= mean.p50


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective", "median"),
        ("num_sms", 0),
        ("num_sms", 2.0),
        ("makespan_budget", -0.1),
        ("makespan_budget", float("nan")),
        ("makespan_budget", "a lot"),
        ("objective", "weighted"),
    ],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        PlanConfig(**{field: value})
