"""What a layer costs when sums are computed and combined in blocks of columns. Compiled.

LayerCosts then has a combine in `exchange` per wave and block, and an entry in `compute` per wave and block. If the
experts start early (arrivals.py), `compute` has one more entry ahead of each wave's blocks.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH, FINISH, FIRST_ATTEND, with_costs
from pipemoe.plan.compiled import compiled, compiled_look, compiled_part
from pipemoe.plan.products import scaled


@compiled
def cut_columns(costs, rates, num_blocks):
    """The same layer in `num_blocks` blocks, behind the early parts if there are any.

    A wave's first block takes everything that comes before the output, and each block its part of the output. A further
    block costs two more of an experts call's six launches (GEMM and sum), so a third of its gaps again, and one more
    group of collectives.
    """
    num_early = costs.num_early
    if num_blocks + num_early == 1:
        return costs
    num_cohorts, num_ranks, num_waves = costs.own.shape
    works = num_early + num_blocks
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
                blockwise = scaled(busy, rates.experts_blockwise_permille, 1000)
                again = (alone - busy) // 3 if blockwise else 0
                for kind in range(2 if num_early else 0):
                    compute[c, r, 1 + w * works, kind] = costs.early[c, r, w, kind]
                for b in range(num_blocks):
                    part = _part(blockwise, b, num_blocks)
                    at = 1 + w * works + num_early + b
                    compute[c, r, at, BUSY] = part if b else busy - blockwise + part
                    compute[c, r, at, ALONE] = compute[c, r, at, BUSY] + (again if b else alone - busy)
        for w in range(costs.num_waves[c]):
            for kind in range(2):
                exchange[c, DISPATCH, w, kind] = costs.exchange[c, DISPATCH, w, kind]
            alone, busy = costs.exchange[c, COMBINE, w, ALONE], costs.exchange[c, COMBINE, w, BUSY]
            for b in range(num_blocks):
                part = _part(busy, b, num_blocks)
                exchange[c, COMBINE, w * num_blocks + b, BUSY] = part
                exchange[c, COMBINE, w * num_blocks + b, ALONE] = alone - busy + part
    return with_costs(costs, compute, exchange, num_blocks, costs.early, num_early)


@compiled_part
def _part(whole, part, num_parts):
    return whole * (part + 1) // num_parts - whole * part // num_parts


@compiled_part
def issuing_ns(rates, num_blocks):
    """ns that a rank's conductor takes to issue the experts of a wave, and its combine."""
    return rates.host_experts_ns * (2 + num_blocks) // 3, rates.host_combine_ns * num_blocks


@compiled_look
def gained_ns(whole, cut):
    """About what a layer gains by being `cut`: what the cohort that gains most would gain by itself, from the begin of
    its last wave's dispatch to the end of the combine, on its slowest rank.
    """
    most = 0
    for c in range(len(whole.num_waves)):
        most = max(most, _last_wave_ns(whole, c) - _last_wave_ns(cut, c))
    return most


@compiled_look
def _last_wave_ns(costs, c):
    last, num_blocks, num_early = costs.num_waves[c] - 1, costs.num_blocks, costs.num_early
    longest = 0
    for r in range(costs.own.shape[1]):
        first, computed = 1 + last * (num_early + num_blocks), costs.exchange[c, DISPATCH, last, ALONE]
        if num_early:
            computed = max(computed, costs.compute[c, r, first, ALONE])
        combined = 0
        for b in range(num_blocks):
            computed += costs.compute[c, r, first + num_early + b, ALONE]
            combined = max(combined, computed) + costs.exchange[c, COMBINE, last * num_blocks + b, ALONE]
        longest = max(longest, combined)
    return longest
