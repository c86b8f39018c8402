"""Costs of attention from timings: what made the timings is found again, and nothing absurd comes of any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.models.measured_attention import COUNTS
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.default import default_cost
from pipemoe.plan.cost.devices import GPUS
from pipemoe.plan.cost.dimensions import dimensions_of_shape
from pipemoe.plan.cost.fit import fit_attend
from pipemoe.plan.cost.model import AttendCost, CostModel, HostCost, attend_busy, rates_of
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape


def pairs_of(count):
    return count * (count + 1) // 2


def takes(attend, count, crowd_permille=0):
    busy = attend_busy(rates_of(CostModel(attend=attend)), count, pairs_of(count))
    return attend.fixed_ns + busy * (1000 + crowd_permille) // 1000


def samples_of(attend, counts=COUNTS, crowd_permille=0):
    return [(count, pairs_of(count), float(takes(attend, count, crowd_permille))) for count in counts]


known = st.builds(
    AttendCost,
    fixed_ns=st.integers(10_000, 10_000_000),
    weights_ns=st.just(0),
    row_ps=st.integers(0, 100_000_000),
    pair_fs=st.integers(0, 1_000_000_000),
)


@given(known, st.integers(0, 200_000))
def test_known_costs_are_found(wanted, least_weights_ns):
    found = fit_attend(samples_of(wanted), [], AttendCost(weights_ns=least_weights_ns))
    assert found.crowd_permille == 0
    for count in (*COUNTS, 64, 2048, 8192):  # also beyond what was timed
        part_of_rows = min(least_weights_ns, wanted.fixed_ns)  # is busy while weights are read, whichever takes longer
        assert takes(found, count) == pytest.approx(takes(wanted, count), rel=0.02, abs=part_of_rows + 1000)


@given(known, st.integers(1, 2000))
def test_what_ranks_of_one_gpu_lose_is_found(wanted, crowd_permille):
    last = COUNTS[-1]
    busy = takes(wanted, last) - wanted.fixed_ns
    crowded = samples_of(wanted, [last], crowd_permille)
    found = fit_attend(samples_of(wanted), crowded, AttendCost(weights_ns=0))
    if busy > 1.1 * wanted.fixed_ns:  # else the fixed part hides it
        assert crowd_permille * 0.45 - 10 <= found.crowd_permille <= crowd_permille + 10
    elif busy < 0.9 * wanted.fixed_ns:
        assert found.crowd_permille == 0


@given(
    st.lists(st.tuples(st.sampled_from((1, 16, 31, 128, 512, 1024)), st.floats(1, 1e12)), min_size=1, max_size=8),
    st.lists(st.floats(1, 1e12), max_size=2),
    st.integers(0, 10_000_000),
    st.booleans(),
)
def test_no_timings_give_a_cost_below_nothing(timings, crowded, issue_ns, by_graphs):
    alone = [(count, pairs_of(count), ns) for count, ns in timings]
    found = fit_attend(alone, [(1024, pairs_of(1024), ns) for ns in crowded], AttendCost(), issue_ns, by_graphs)
    # AttendCost itself refuses what is no whole number of at least 0; as long as nothing was timed as longer, ...
    longest = max(ns for _, ns in timings)
    most = max(count for count, _ in timings)
    assert takes(found, most) <= 3 * longest + AttendCost().fixed_ns + AttendCost().weights_ns


@given(st.integers(5_000, 10_000_000), st.floats(0.9, 1.1))
def test_linear_attention_costs_nothing_by_pairs(row_ps, noise):
    wanted = AttendCost(5_000_000, 0, row_ps, 0)
    alone = samples_of(wanted)
    alone[0] = (*alone[0][:2], alone[0][2] * (1 + (noise - 1) / 50))  # the short one is least certain
    found = fit_attend(alone, [], AttendCost(weights_ns=0))
    assert takes(found, 4096) == pytest.approx(takes(wanted, 4096), rel=0.1)


def test_what_issuing_takes_stays_unless_graphs_were_issued():
    """The clock needs the constant of attention that takes as long as its launches: else long prompts are too cheap."""
    wanted = AttendCost(5_000_000, 0, 2_000_000, 0)
    start = AttendCost(fixed_ns=5000, weights_ns=110_000)
    by_launches = fit_attend(samples_of(wanted), [], start, 5_000_000)
    assert takes(by_launches, 2048) == pytest.approx(9_096_000, rel=0.02)
    by_graphs = fit_attend(samples_of(wanted), [], start, 5_000_000, by_graphs=True)
    assert (by_graphs.fixed_ns, by_graphs.weights_ns) == (5000, 110_000)
    assert by_graphs.row_ps == pytest.approx(2_000_000, rel=0.01)


@given(st.integers(1_000_000, 3_000_000), st.integers(100, 400), st.booleans())
def test_what_issuing_hides_is_told_apart_from_what_grows(issue_ns, hidden_rows, by_pairs):
    """Times that are issuing's would look like a constant, and with those that are longer like a square."""
    if by_pairs:
        wanted = AttendCost(0, 0, 0, issue_ns * 10**6 // pairs_of(hidden_rows))
    else:
        wanted = AttendCost(0, 0, issue_ns * 1000 // hidden_rows, 0)
    alone = [(count, pairs, max(float(issue_ns), ns)) for count, pairs, ns in samples_of(wanted)]
    found = fit_attend(alone, [], AttendCost(weights_ns=0), issue_ns)
    for count in (*COUNTS, 4096):
        assert max(issue_ns, takes(found, count)) == pytest.approx(max(issue_ns, takes(wanted, count)), rel=0.02)


def test_auto_sees_that_eager_attention_is_slow():
    """GPT-OSS-20B on quarters of an H200: derived from its dimensions, a long prompt's attention seems cheap."""
    shape = ModelShape(2880, 2880, 32, 4, 8)
    derived = default_cost(
        GPUS["h200"], dimensions_of_shape(shape), 4, value_bytes=2, sum_bytes=2, ranks_per_device=4, ctas=1
    )
    alone = [(count, pairs_of(count), ns) for count, ns in ((16, 1.2e6), (128, 1.4e6), (512, 3.7e6), (1024, 8e6))]
    measured = CostModel(
        **{
            **vars(derived),
            "attend": fit_attend(alone, [], derived.attend),
            "host": HostCost(attend_ns=1_200_000, graph_rows=0),
        }
    )
    facts = Facts(((2048,), (16,), (16,), (16,)))
    config = PlanConfig(mode="auto", moe_max_num_tokens=4096, num_slots=2, whole_sequences=True, makespan_budget=0.1)
    cohorts = [
        [sorted({part.rank for part in cohort.microbatches}) for cohort in plan(facts, shape, config, cost).cohorts]
        for cost in (derived, measured)
    ]
    assert cohorts[0] == [[0, 1, 2, 3]] and sorted(cohorts[1]) == [[0], [1, 2, 3]]
