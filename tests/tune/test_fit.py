"""Fitting: what made the samples is found again."""

import math
from dataclasses import replace

import pytest

from pipemoe.plan.clock.prediction import simulate
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import (
    AttendCost,
    ContentionCost,
    CostModel,
    ExchangeCost,
    ExpertsCost,
    HostCost,
    SmsCost,
    attend_busy,
    experts_busy,
    rates_of,
)
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape
from pipemoe.tune.fit import Samples, calibrate, fit_contention, fit_cost, fit_sms, least_squares

SHAPE = ModelShape(2048, 768, 128, 8, 4)


def samples_of(cost: CostModel) -> Samples:
    rates, samples = rates_of(cost), Samples()
    for rows in (1, 16, 64, 256, 1024, 4096):
        for pairs in (rows, rows * rows // 2):
            busy = attend_busy(rates, rows, pairs)
            samples.attend.append((rows, pairs, cost.attend.fixed_ns + busy))
            samples.crowded.append(
                (rows, pairs, cost.attend.fixed_ns + busy * (1000 + cost.attend.crowd_permille) // 1000)
            )
        samples.experts.append(
            (rows, cost.experts.fixed_ns + experts_busy(rates, rows, SHAPE.num_experts, SHAPE.top_k, 4))
        )
        for segments in (1, 4):
            for into, part in ((samples.dispatch, cost.dispatch), (samples.combine, cost.combine)):
                into.append((segments, rows, part.fixed_ns + segments * part.segment_ns + rows * part.row_ps / 1000))
    samples.host = {"attend": [1000.0, 1000.0, 5000.0], "combine": [7.0]}
    samples.start = [(1024, 1024, -5.0)]  # measured beside something else: not possible, so left out
    samples.start += [
        (rows, pairs, 1e6 + rows * cost.attend.first_row_ps / 1e3 + pairs * cost.attend.first_pair_fs / 1e6)
        for rows, pairs, _ in samples.attend
    ]
    return samples


@pytest.mark.parametrize("tile_rows", [1, 16, 64])
def test_the_costs_that_made_the_samples_are_found(tile_rows):
    wanted = CostModel(
        attend=AttendCost(500_000, 0, 120_000, 60_000, 300, 0, 360_000, 180_000),
        experts=ExpertsCost(90_000, 4_000, 30_000, 8_571, tile_rows),
        dispatch=ExchangeCost(80_000, 9_000, 20_000),
        combine=ExchangeCost(40_000, 0, 50_000),
    )
    found = fit_cost(samples_of(wanted), CostModel(), SHAPE, 4)
    for part in ("attend", "experts", "dispatch", "combine"):
        for name in getattr(wanted, part).__slots__:
            if name not in ("fixed_ns", "weights_ns", "crowd_permille"):
                least = 0 if name == "tile_rows" else 200
                assert getattr(getattr(found, part), name) == pytest.approx(
                    getattr(getattr(wanted, part), name), rel=0.05, abs=least
                )
    assert found.attend.fixed_ns + found.attend.weights_ns == pytest.approx(500_000, rel=0.05)
    assert 200 <= found.attend.crowd_permille <= 300 and found.start_ns == pytest.approx(1e6, rel=0.01)
    assert (
        found.host.attend_ns == 1000
        and found.host.combine_ns == 7
        and found.host.dispatch_ns == CostModel().host.dispatch_ns
    )


def test_coefficients_are_never_negative():
    assert (least_squares([(1, 1), (1, 2), (1, 3)], [30, 20, 10]) >= 0).all()
    with pytest.raises(ValueError, match="nothing was measured"):
        least_squares([], [])


def test_measured_speeds_become_the_table():
    speeds = {
        ("attend", "attend"): (0.8, 0.3),
        ("attend", "experts"): (0.4, 0.6),
        ("experts", "attend"): (0.7, 0.2),
        ("experts", "dispatch"): (0.65, 1.2),
        ("dispatch", "dispatch"): (0.5, 0.6),
        ("experts", "combine"): (0.0, 0.9),
    }
    found = fit_contention(speeds)
    assert (found.attend_beside_attend, found.attend_under_attend) == (800, 300)
    assert (found.attend_beside_experts, found.experts_under_attend) == (400, 600)
    assert (found.experts_beside_attend, found.attend_under_experts) == (700, 200)
    assert (found.experts_beside_dispatch, found.dispatch_beside_experts) == (650, 1000)
    assert found.dispatch_beside_dispatch == 550 and found.experts_beside_combine == 50
    assert found.combine_beside_combine == ContentionCost().combine_beside_combine


def test_measured_speeds_become_what_leaving_multiprocessors_does():
    dispatch, combine = ("experts", "dispatch"), ("experts", "combine")
    usual = {dispatch: (0.8, 0.5), combine: (0.5, 0.4), ("attend", "experts"): (0.1, 0.1)}
    found = fit_sms(
        SmsCost(132, 8),
        usual,
        {dispatch: (0.6, 0.25), combine: (0.25, 0.4)},
        {dispatch: (0.8, 1.0), combine: (0.5, 0.0)},
    )
    assert (found.num_sms, found.ctas) == (132, 8)
    assert (found.crowded_experts_permille, found.crowded_transfers_permille) == (625, 750)
    assert (found.roomy_experts_permille, found.roomy_transfers_permille) == (1000, 1062)  # nothing stops for good


def test_calibration_finds_what_was_scaled():
    worse = ContentionCost(attend_under_attend=100, experts_under_experts=50, experts_beside_dispatch=400)
    # launches must not bind, or contention does not show
    base = CostModel(host=HostCost(*(5000,) * 7), contention=worse)
    wanted = replace(
        base,
        attend=replace(base.attend, row_ps=base.attend.row_ps * 13 // 10, pair_fs=base.attend.pair_fs * 13 // 10),
        experts=replace(
            base.experts, pair_ps=base.experts.pair_ps * 13 // 10, expert_ns=base.experts.expert_ns * 13 // 10
        ),
        contention=ContentionCost(),
    )
    counts = [((n,),) * 4 for n in (256, 2048)] + [((2048,), (32,), (32,), (32,))]
    steps = [(mode, Facts(of_ranks)) for mode in ("broadcast", "two_batch", "per_rank") for of_ranks in counts]

    def makespan(cost, mode, facts):
        return simulate(plan(facts, SHAPE, PlanConfig(mode=mode), cost), cost).makespan

    measured = [makespan(wanted, *step) for step in steps]

    def log_error(cost):
        return sum(abs(math.log(makespan(cost, *step) / m)) for step, m in zip(steps, measured))

    found = calibrate(base, log_error)
    assert log_error(found) < log_error(base) / 2

    unseen = [
        (mode, Facts(((1024,), (1024,), (64,), (512,)))) for mode in ("broadcast", "two_batch", "per_rank", "pipelined")
    ]
    before, after = (
        sum(abs(math.log(makespan(cost, *step) / makespan(wanted, *step))) for step in unseen) for cost in (base, found)
    )
    assert after < before / 2


def test_what_transfers_lose_is_calibrated_apart_from_what_computations_lose():
    base = CostModel(
        contention=ContentionCost(attend_beside_experts=600, experts_beside_dispatch=600, combine_beside_attend=200)
    )

    def log_error(cost):
        return abs(math.log(cost.contention.experts_beside_dispatch / 800)) + abs(
            math.log(cost.contention.attend_beside_experts / 600)
        )

    found = calibrate(base, log_error).contention
    assert (found.experts_beside_dispatch, found.combine_beside_attend, found.attend_beside_experts) == (800, 600, 600)


def test_issuing_from_a_tape_is_shared_out():
    samples = samples_of(CostModel())
    samples.host = {"graph": [30.0], "dispatch": [10.0], "experts": [50.0], "combine": [10.0], "finish": [400.0]}
    start = CostModel(host=replace(CostModel().host, pack_ns=0))
    assert fit_cost(samples, start, SHAPE, 1).host.experts_ns == 50
    samples.taped = [19.0, 20.0, 90.0]
    host = fit_cost(samples, start, SHAPE, 1).host
    assert (host.graph_ns, host.pack_ns, host.dispatch_ns, host.experts_ns, host.combine_ns) == (6, 0, 2, 10, 2)
    assert host.finish_ns == 400
