"""What a layer costs if its waves are computed as they arrive. Compiled."""

from __future__ import annotations

import numpy as np

from pipemoe.plan.arrivals import group_of, groups_for, most_groups
from pipemoe.plan.clock.layer import ALONE, BUSY, DISPATCH, with_costs
from pipemoe.plan.compiled import compiled
from pipemoe.plan.cost.model import experts_busy
from pipemoe.plan.products import scaled


@compiled
def take_as_they_arrive(costs, segments, wave_rows, rates, num_experts, top_k):
    """The same layer with its dispatches in groups, and with early_ns.

    After the last group has arrived, the experts still compute the first GEMM of its rows, and the second GEMM and the
    sums of all rows. They read again all weights that the late rows need, unless no time is left for an early part. All
    of it takes longer, as fewer multiprocessors compute (arrivals_permille). A gathered wave is one group. Blocks of
    columns are cut afterwards.
    """
    num_cohorts, num_ranks, num_waves = costs.own.shape
    compute, exchange = costs.compute.copy(), costs.exchange.copy()
    early_ns, groups = np.zeros((num_cohorts, num_ranks, num_waves), np.int64), np.ones(num_cohorts, np.int64)
    speed = rates.experts_arrivals_permille if rates.experts_arrivals_permille else 1000
    rows_of = np.zeros((most_groups(1), num_ranks), np.int64)  # by group, of one wave
    calls_of = np.zeros(most_groups(1), np.int64)
    first = 0
    while first < len(segments):
        c, w = segments[first, 0], segments[first, 1]
        stop, ranks, before = first, 0, -1
        while stop < len(segments) and segments[stop, 0] == c and segments[stop, 1] == w:
            ranks += segments[stop, 2] != before
            before = segments[stop, 2]
            stop += 1
        gathered = costs.gathered[c, w]
        count = 1 if gathered else groups_for(ranks, costs.num_waves[c])
        rows_of[:], calls_of[:] = 0, 0
        row = 0
        for i in range(first, stop):
            rows = segments[i, 4] - segments[i, 3]
            group = 0 if gathered else group_of(row, rows, wave_rows[c, w], count)
            rows_of[group, segments[i, 2]] += rows
            calls_of[group] += 1
            row += rows
        first = stop
        last, used, alone, busy = 0, 0, 0, 0
        for group in range(count):
            if calls_of[group]:
                moved = scaled(rows_of[group].sum() - rows_of[group].min(), rates.dispatch_row_ps, 1000)
                alone += rates.dispatch_fixed_ns + calls_of[group] * rates.dispatch_segment_ns + moved
                last, used, busy = group, used + 1, busy + moved
        if not gathered:
            exchange[c, DISPATCH, w, ALONE], exchange[c, DISPATCH, w, BUSY] = alone, busy
        groups[c] = max(groups[c], used)
        for r in range(num_ranks):
            late = rows_of[last].sum() - rows_of[last, r]
            if gathered:
                late = wave_rows[c, w] - wave_rows[c, w] // num_ranks
            busy = scaled(costs.compute[c, r, 1 + w, BUSY], 1000, speed)
            of_late = scaled(experts_busy(rates, late, num_experts, top_k, num_ranks), 1000, speed)
            early_ns[c, r, w] = scaled(max(0, busy - of_late), 1000 - rates.experts_blockwise_permille, 1000)
            compute[c, r, 1 + w, ALONE] += busy - compute[c, r, 1 + w, BUSY]
            compute[c, r, 1 + w, BUSY] = busy
    return with_costs(costs, compute, exchange, costs.num_blocks, groups, early_ns, 1)
