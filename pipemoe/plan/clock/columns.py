"""What a layer costs when sums are computed and combined in blocks of columns. Compiled.

Of LayerCosts, `compute` then has an entry per wave and block where it had one per wave, and so have the combines of
`exchange`. With heads (arrival_costs) `compute` has one more per wave, ahead of its blocks.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH, FINISH, FIRST_ATTEND, LayerCosts
from pipemoe.plan.compiled import compiled, compiled_look, compiled_part
from pipemoe.plan.products import scaled


@compiled
def cut_columns(costs, rates, num_blocks):
    """The same layer in `num_blocks` blocks, behind the heads if there are any.

    The first block of a wave's experts takes all that comes before the output, and each one its part of that. A further
    block is two of an experts call's six launches (GEMM and sum), so a third of its gaps again; and a group of
    collectives of its own.
    """
    heads = costs.num_heads
    if num_blocks + heads == 1:
        return costs
    num_cohorts, num_ranks, num_waves = costs.own.shape
    works = heads + num_blocks
    compute = np.zeros((num_cohorts, num_ranks, 3 + num_waves * works, 2), np.int64)
    exchange = np.zeros((num_cohorts, 2, num_waves * num_blocks, 2), np.int64)
    for c in range(num_cohorts):
        for r in range(num_ranks):
            for kind in range(2):
                compute[c, r, 0, kind] = costs.compute[c, r, 0, kind]
                for work in (FINISH, FIRST_ATTEND):
                    compute[c, r, work, kind] = costs.compute[c, r, work, kind]
            for w in range(costs.num_waves[c]):
                alone, busy = costs.compute[c, r, 1 + w, ALONE], costs.compute[c, r, 1 + w, BUSY]
                sliced = scaled(busy, rates.experts_sliced_permille, 1000)
                again = (alone - busy) // 3 if sliced else 0
                head = costs.heads[c, r, w]
                if heads:
                    compute[c, r, 1 + w * works, ALONE] = compute[c, r, 1 + w * works, BUSY] = head
                for b in range(num_blocks):
                    part = _part(sliced, b, num_blocks)
                    at = 1 + w * works + heads + b
                    compute[c, r, at, BUSY] = part if b else busy - sliced - head + part
                    compute[c, r, at, ALONE] = compute[c, r, at, BUSY] + (again if b else alone - busy)
        for w in range(costs.num_waves[c]):
            for kind in range(2):
                exchange[c, DISPATCH, w, kind] = costs.exchange[c, DISPATCH, w, kind]
            alone, busy = costs.exchange[c, COMBINE, w, ALONE], costs.exchange[c, COMBINE, w, BUSY]
            for b in range(num_blocks):
                part = _part(busy, b, num_blocks)
                exchange[c, COMBINE, w * num_blocks + b, BUSY] = part
                exchange[c, COMBINE, w * num_blocks + b, ALONE] = alone - busy + part
    return LayerCosts(
        costs.num_waves,
        compute,
        exchange,
        costs.own,
        costs.ends,
        costs.waits,
        costs.issue,
        num_blocks,
        costs.gathered,
        costs.groups,
        costs.heads,
        heads,
    )


@compiled_part
def _part(whole, part, num_parts):
    return whole * (part + 1) // num_parts - whole * part // num_parts


@compiled_part
def issuing_ns(rates, num_blocks):
    """ns that a rank's engine takes to issue the experts of a wave, and its combine."""
    return rates.host_experts_ns * (2 + num_blocks) // 3, rates.host_combine_ns * num_blocks


@compiled_look
def gained_ns(whole, cut):
    """What a layer of the cohort that gains most, by itself, gains by being `cut`: of the time from the begin of its
    last wave's dispatch to the end of the combine, on the rank where that takes longest."""
    most = 0
    for c in range(len(whole.num_waves)):
        most = max(most, _last_wave_ns(whole, c) - _last_wave_ns(cut, c))
    return most


@compiled_look
def _last_wave_ns(costs, c):
    last, num_blocks, heads = costs.num_waves[c] - 1, costs.num_blocks, costs.num_heads
    longest = 0
    for r in range(costs.own.shape[1]):
        first, computed = 1 + last * (heads + num_blocks), costs.exchange[c, DISPATCH, last, ALONE]
        if heads:
            computed = max(computed, costs.compute[c, r, first, ALONE])
        combined = 0
        for b in range(num_blocks):
            computed += costs.compute[c, r, first + heads + b, ALONE]
            combined = max(combined, computed) + costs.exchange[c, COMBINE, last * num_blocks + b, ALONE]
        longest = max(longest, combined)
    return longest
