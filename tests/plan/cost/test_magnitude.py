"""Nothing in the planner wraps around in 64 bits: compiled costs equal Python's own whole numbers, and what is too long
is refused.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import ConfigError, InputError
from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.plan.auto.choice import auto_candidates
from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH
from pipemoe.plan.clock.prediction import costs_of, simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS
from pipemoe.plan.cost.magnitude import LONGEST_NS, MOST_TOKENS, check_magnitude, longest_ns
from pipemoe.plan.cost.model import (
    AttendCost,
    ContentionCost,
    CostModel,
    ExchangeCost,
    ExpertsCost,
    SmsCost,
    attend_busy,
    experts_busy,
    first_busy,
    rates_of,
)
from pipemoe.plan.planner import plan
from pipemoe.plan.products import in_proportion, scaled
from pipemoe.plan.schedule import Facts, ModelShape

SHAPE = ModelShape(hidden=64, intermediate=32, num_experts=8, top_k=2, num_layers=2)
LARGE = st.one_of(st.integers(0, 10**6), st.integers(0, 1 << 53))


@settings(deadline=None)
@given(st.integers(0, (1 << 62) - 1), LARGE, st.one_of(st.integers(1, 3000), st.integers(1, (1 << 31) - 1)))
def test_scaled_is_exact_wherever_the_result_fits(value, numerator, denominator):
    wanted = value * numerator // denominator
    if wanted < 1 << 62:
        assert scaled(value, numerator, denominator) == wanted


@settings(deadline=None)
@given(st.integers(0, 1 << 53), st.integers(0, 1 << 53), st.integers(1, 1 << 53))
def test_in_proportion(value, part, whole):
    part = min(part, whole)
    found, wanted = in_proportion(value, part, whole), value * part // whole
    assert found == wanted if whole < 1 << 31 else abs(found - wanted) <= 1 + (value >> 29)


def big(value, numerator, denominator):
    """What `scaled` computes, in Python's whole numbers."""
    return int(value) * int(numerator) // int(denominator)


@settings(deadline=None)
@given(st.integers(0, MOST_TOKENS), st.integers(0, 1 << 61), st.integers(0, 10**9), st.integers(0, 10**9))
def test_attention_of_any_size(rows, pairs, row_ps, pair_fs):
    attend = AttendCost(row_ps=row_ps, pair_fs=pair_fs, first_row_ps=row_ps // 2, first_pair_fs=pair_fs // 2)
    wanted = max(attend.weights_ns, big(rows, row_ps, 1000)) + big(pairs, pair_fs, 10**6)
    first = big(rows, row_ps // 2, 1000) + big(pairs, pair_fs // 2, 10**6)
    rates = rates_of(CostModel(attend=attend))
    if wanted < 1 << 62:
        assert attend_busy(rates, rows, pairs) == wanted and first_busy(rates, rows, pairs) == first


@settings(deadline=None)
@given(
    st.integers(1, MOST_TOKENS), st.integers(1, 64), st.integers(0, 10**6), st.integers(0, 10**8), st.integers(0, 100)
)
def test_experts_of_any_size(rows, num_ranks, pair_ps, expert_ns, sms_left):
    """With every expert hit, as so many rows do, the price is a formula of Python's whole numbers."""
    rates = rates_of(CostModel(experts=ExpertsCost(pair_ps=pair_ps, expert_ns=expert_ns, row_ps=4_000, tile_rows=64)))
    rows, num_experts, top_k = rows + 100_000, 128, 8
    local = -(-num_experts // num_ranks)
    pairs = -(-rows * top_k * local // num_experts)
    padded = max(pairs + local * 63 // 2, local * 64)
    pairs_ps = padded * pair_ps if not sms_left else padded * pair_ps * 132 // (132 - sms_left)
    wanted = local * expert_ns + (pairs_ps + rows * 4_000) // 1000
    if pairs_ps < 1 << 62:
        assert experts_busy(rates, rows, num_experts, top_k, num_ranks, sms_left) == wanted


COSTS = st.builds(
    CostModel,
    attend=st.builds(
        AttendCost,
        **dict.fromkeys(
            ("fixed_ns", "weights_ns", "row_ps", "first_weights_ns", "first_row_ps"), st.integers(0, 10**9)
        ),
        pair_fs=st.integers(0, 3 * 10**7),
        first_pair_fs=st.integers(0, 10**10),
        crowd_permille=st.integers(0, 2000),
    ),
    experts=st.builds(
        ExpertsCost, expert_ns=st.integers(0, 10**9), pair_ps=st.integers(0, 10**9), row_ps=st.integers(0, 10**9)
    ),
    dispatch=st.builds(ExchangeCost, row_ps=st.integers(0, 10**9)),
    combine=st.builds(ExchangeCost, row_ps=st.integers(0, 10**9)),
)


@settings(deadline=None, max_examples=100)
@given(
    COSTS,
    st.lists(st.integers(0, 3 * 10**6), min_size=1, max_size=4),
    st.sampled_from(("broadcast", "padded", "pipelined", "two_batch")),
)
def test_costs_and_clock_of_large_steps(cost, tokens, mode):
    """Whatever is not refused is priced as in Python's whole numbers, and its clock ends no earlier than the dearest
    operation.
    """
    facts = Facts(tuple((n,) if n else () for n in tokens))
    config = PlanConfig(mode=mode, moe_max_num_tokens=10**8, max_tokens_per_rank=10**8)
    try:
        check_magnitude(facts, SHAPE, config, cost)
    except InputError:
        return
    if not any(tokens):
        return
    chosen = plan(facts, SHAPE, config, cost)
    costs, attend = costs_of(chosen, cost), cost.attend
    rows = max(wave.num_rows for cohort in chosen.cohorts for wave in cohort.waves)
    dearest = 0
    for c, cohort in enumerate(chosen.cohorts):
        for rank in range(len(tokens)):
            count = cohort.tokens_of(rank)
            if count and len(chosen.cohorts) == 1:
                busy = max(attend.weights_ns, big(count, attend.row_ps, 1000)) + big(
                    count * (count + 1) // 2, attend.pair_fs, 10**6
                )
                if not attend.crowd_permille and not _graphed(count):
                    assert costs.compute[c, rank, 0, BUSY] == busy
                dearest = max(dearest, busy)
    assert int(costs.compute.min()) >= 0 and int(costs.exchange.min()) >= 0
    assert (
        int(costs.exchange[:, DISPATCH].max())
        <= big(rows, cost.dispatch.row_ps, 1000) + cost.dispatch.fixed_ns + 99 * cost.dispatch.segment_ns
    )
    assert int(costs.exchange[:, COMBINE, :, ALONE].max()) <= longest_ns(facts, SHAPE, config, cost)
    prediction = simulate(chosen, cost)
    assert SHAPE.num_layers * dearest <= prediction.makespan <= 1000 * longest_ns(facts, SHAPE, config, cost)


def _graphed(count: int) -> bool:
    return count <= CostModel().host.graph_rows


def test_a_long_prompt_is_as_dear_as_its_pairs():
    """Longer prompts once took less time by the plan than shorter ones: the products of pairs and costs had wrapped."""
    dimensions = dimensions_of(MODEL_CONFIGS["deepseek-v3"])
    shape, cost = (
        replace(dimensions.shape, num_layers=8),
        default_cost(GPUS["h200"], dimensions, 2, value_bytes=2, sum_bytes=2),
    )
    slowest = {}
    for tokens in (5_000_000, 10_000_000):
        config = PlanConfig(mode="pipelined", max_tokens_per_rank=tokens)
        facts = Facts(((tokens,), (16,)))
        slowest[tokens] = simulate(plan(facts, shape, config, cost), cost).makespan
        of_pairs = tokens * (tokens + 1) // 2 * cost.attend.pair_fs // 10**6
        assert of_pairs * 8 <= slowest[tokens] <= 1.1 * of_pairs * (8 + dimensions.num_dense_layers)
    assert 3.9 < slowest[10_000_000] / slowest[5_000_000] < 4.1


def test_mode_auto_on_a_step_of_hours():
    cost = CostModel()
    config = PlanConfig(mode="auto", max_tokens_per_rank=10**7, makespan_budget=100)
    facts = Facts(((8_000_000, *(1,) * 100), (5,)))
    candidates = auto_candidates(facts, ModelShape(64, 32, 8, 2, 48), config, cost)
    of_pairs = 48 * 8_000_000**2 // 2 * cost.attend.pair_fs // 10**6
    assert all(0 < c.mean <= c.slowest and 0 < c.p50 <= c.slowest for c in candidates)
    assert (
        all(of_pairs // 5 <= c.slowest <= 2 * of_pairs for c in candidates) and sum(c.chosen for c in candidates) == 1
    )


def test_what_is_too_long_to_reckon_with_is_refused():
    cost = CostModel(attend=AttendCost(pair_fs=1 << 52))
    facts, config = Facts(((10**6,),)), PlanConfig(mode="broadcast", max_tokens_per_rank=10**9)
    for look in (lambda: plan(facts, SHAPE, config, cost), lambda: auto_candidates(facts, SHAPE, config, cost)):
        with pytest.raises(InputError, match=r"a step of 1000000 tokens may take \d+ days; at most 5"):
            look()
    cheap = plan(facts, SHAPE, config)
    with pytest.raises(InputError, match="days"):
        simulate(cheap, cost)
    many = Facts(((MOST_TOKENS,), (1,)))
    with pytest.raises(InputError, match=f"{MOST_TOKENS + 1} tokens in one step; at most {MOST_TOKENS}"):
        plan(many, SHAPE, replace(config, max_tokens_per_rank=MOST_TOKENS))
    assert longest_ns(Facts(((10**4,),) * 256), SHAPE, config, CostModel()) < LONGEST_NS


@pytest.mark.parametrize(
    "make",
    [
        lambda: ContentionCost(attend_beside_attend=10**6),
        lambda: SmsCost(num_sms=1 << 40),
        lambda: ExpertsCost(tile_rows=1 << 40),
        lambda: CostModel(gap_permille=10**30),
        lambda: CostModel(start_ns=1 << 60),
    ],
)
def test_rates_that_no_device_has(make):
    with pytest.raises(ConfigError, match="must be"):
        make()


def test_a_mean_over_many_late_sequences():
    from pipemoe.plan.auto.figures import _summarise

    finish, ends, figures = np.array([[1 << 58, 7]], np.int64), np.array([[10**6, 1]], np.int64), np.zeros(3, np.int64)
    _summarise(finish, ends, figures)
    assert figures[0] == ((1 << 58) * 10**6 + 7) // (10**6 + 1) and figures[1] == figures[2] == 1 << 58
