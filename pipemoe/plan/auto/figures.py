"""What a candidate of mode "auto" takes: bounds and a guess without a clock, and the clock's prediction. Compiled.

A deep model runs on the clock twice, with few layers and with half of them; the rest is carried on in a straight line.
All layers are alike, so cohorts side by side finish in proportion to the number of layers.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.clock import run_clock
from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH, FIRST_ATTEND
from pipemoe.plan.clock.order import order_keys
from pipemoe.plan.clock.sms import speeds_where_left
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.cost.tuned import CANDIDATE_EVENTS, CANDIDATE_LAYERS


@compiled_part
def set_bounds(costs, weight, rates, speeds, num_layers, num_slots, bound, guess):
    """Set bound and guess, each mean, slowest and p50.

    bound: no plan of these cohorts can do better. A cohort takes as long as it would alone, behind the cohort that had
    its slot. Nothing ends before each conductor has issued everything, nor before each rank (or the cores of all)
    has computed everything at full speed. guess: what the figures may be like, if earlier cohorts go first.
    """
    num_cohorts, num_ranks = costs.ends.shape
    num_waves, ends = costs.num_waves, costs.ends
    compute, exchange, own, issue = costs.compute, costs.exchange, costs.own, costs.issue
    finish, likely = np.zeros((num_cohorts, num_ranks), np.int64), np.zeros((num_cohorts, num_ranks), np.int64)
    computed, issued = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    together = 1000  # what two computations side by side get done
    for a in range(2):
        for b in range(2):
            together = max(together, speeds[0, a, b] + speeds[1, b, a])
    for c in range(num_cohorts):
        chain, most, total = 0, 0, 0
        for r in range(num_ranks):
            last = -1
            computed[r] += compute[c, r, 0, BUSY]
            issued[r] += issue[c, r] + num_waves[c] * (
                rates.host_dispatch_ns + rates.host_experts_ns + rates.host_combine_ns
            )
            for w in range(num_waves[c]):
                computed[r] += compute[c, r, 1 + w, BUSY]
                if own[c, r, w]:
                    last = w
                    issued[r] += rates.host_pack_ns
            if last >= 0:
                alone = compute[c, r, 0, ALONE] + exchange[c, DISPATCH, last, ALONE]
                alone += compute[c, r, 1 + last, ALONE] + exchange[c, COMBINE, last, ALONE]
                chain = max(chain, alone * num_layers + compute[c, r, FIRST_ATTEND, ALONE] - compute[c, r, 0, ALONE])
            most, total = max(most, issued[r], computed[r] * 1000 // together), total + weight[r] * computed[r]
        if rates.cores_permille:
            most = total * 1000 // rates.cores_permille
        before = finish[c - num_slots].max() if c >= num_slots else 0
        finish[c] = before + chain
        likely[c] = max(before + chain, most * num_layers)
    _summarise(finish, ends, bound)
    _summarise(likely, ends, guess)
    bound[1] = max(bound[1], guess[1])


@compiled_part
def layers_and_events(costs, num_layers):
    """How many layers to run (and then half of them), and about how many events on the clock that takes."""
    num_cohorts, num_ranks = costs.ends.shape
    in_layer = (num_cohorts + costs.num_waves.sum()) * (2 + num_ranks) * 7 // 4
    layers = min(num_layers, max(4, min(CANDIDATE_LAYERS, 2 * (CANDIDATE_EVENTS // (3 * in_layer)))))
    return layers, in_layer * (layers if layers == num_layers else layers + layers // 2)


@compiled_part
def predict(costs, weight, problem, sms_left, figures):
    """Set figures [3]: mean, slowest and p50 of the sequences' ns to the first token. Returns the events it took."""
    num_layers, num_slots, num_buffers = problem.num_layers, problem.num_slots, problem.num_buffers
    rates, speeds = problem.rates, problem.speeds
    num_cohorts = len(costs.num_waves)
    slots = np.empty(num_cohorts, np.int64)
    for c in range(num_cohorts):
        slots[c] = c % num_slots
    nothing = np.empty((1, 1, 1, 1), np.int64)
    table = speeds_where_left(rates, speeds, sms_left, min(num_cohorts, num_slots))
    layers, _ = layers_and_events(costs, num_layers)
    keys = order_keys(costs, rates, num_slots, layers)
    finish, _, events = run_clock(
        costs, keys, slots, weight, layers, num_buffers, rates, table, nothing, nothing, False
    )
    if layers < num_layers:
        few = layers // 2
        keys = order_keys(costs, rates, num_slots, few)
        before, _, more = run_clock(costs, keys, slots, weight, few, num_buffers, rates, table, nothing, nothing, False)
        finish += (finish - before) * (num_layers - layers) // (layers - few)
        events += more
    _summarise(finish, costs.ends, figures)
    return events


@compiled_part
def _summarise(finish, ends, figures):
    """Set figures: mean, largest and median of `finish` [C, R], each counted as often as `ends` says."""
    num_cohorts, num_ranks = ends.shape
    count, slowest = ends.sum(), 0
    mean, rest = 0, 0  # the sum of all, in turns of `count`: as one number it would not always fit int64
    for c in range(num_cohorts):
        for r in range(num_ranks):
            if ends[c, r]:
                mean += ends[c, r] * (finish[c, r] // count)
                rest += ends[c, r] * (finish[c, r] % count)
                slowest = max(slowest, finish[c, r])
    median = slowest
    for c in range(num_cohorts):
        for r in range(num_ranks):
            if not ends[c, r] or finish[c, r] >= median:
                continue
            no_later = 0
            for d in range(num_cohorts):
                for q in range(num_ranks):
                    if finish[d, q] <= finish[c, r]:
                        no_later += ends[d, q]
            if 2 * no_later >= count:
                median = finish[c, r]
    figures[0], figures[1], figures[2] = mean + rest // count, slowest, median
