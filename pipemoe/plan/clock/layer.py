"""What one layer of every cohort costs on every rank: cohorts are cut into waves, and operations priced. Compiled.

microbatches  int64 [M, 4]  cohort, rank, start, stop; by cohort, in the order in which they fill its waves
segments      int64 [S, 5]  cohort, wave, rank, start, stop
starts        int64 [.]     where each sequence starts, and where the last one ends, rank after rank
first         int64 [R + 1] where each rank's begin in `starts`
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipemoe.plan.compiled import compiled, compiled_look, compiled_part
from pipemoe.plan.cost.model import attend_busy, experts_busy, first_busy, graph_rows
from pipemoe.plan.cost.tuned import ALIKE_PARTS, MOST_RANKS
from pipemoe.plan.products import in_proportion, scaled
from pipemoe.plan.schedule import is_even

ALONE, BUSY = 0, 1
FINISH, FIRST_ATTEND = -2, -1  # the last works in `compute`
DISPATCH, COMBINE = 0, 1


class LayerCosts(NamedTuple):
    """A layer of C cohorts on R ranks, in at most W waves."""

    num_waves: Any  # [C]
    compute: Any  # [C, R, 3 + W, 2]: attend, experts of each wave, finish, the first layer's attend; ns ALONE and BUSY
    exchange: Any  # [C, 2, W, 2]: DISPATCH and COMBINE of each wave; ns ALONE and BUSY
    own: Any  # bool [C, R, W]: has the rank rows in the wave?
    ends: Any  # [C, R]: sequences whose last token the cohort holds
    waits: Any  # [C, C]: see attention_waits
    issue: Any  # [C, R]: ns to issue an attend


@compiled_part
def cut_waves(microbatches, num_cohorts, limit):
    """Segments, rows per wave [C, W] and waves per cohort: as few waves of at most `limit` rows as possible, of even
    sizes, so that the last is not tiny.
    """
    rows = np.zeros(num_cohorts, np.int64)
    for m in range(len(microbatches)):
        rows[microbatches[m, 0]] += microbatches[m, 3] - microbatches[m, 2]
    num_waves, sizes = np.empty(num_cohorts, np.int64), np.empty(num_cohorts, np.int64)
    most, total = 0, 0
    for c in range(num_cohorts):
        count = (rows[c] + limit - 1) // limit
        sizes[c] = (rows[c] + count - 1) // count
        num_waves[c] = (rows[c] + sizes[c] - 1) // sizes[c]
        most, total = max(most, num_waves[c]), total + num_waves[c]
    wave_rows = np.zeros((num_cohorts, most), np.int64)
    segments = np.empty((len(microbatches) + total, 5), np.int64)
    count, wave, cohort = 0, 0, -1
    for m in range(len(microbatches)):
        if microbatches[m, 0] != cohort:
            cohort, wave = microbatches[m, 0], 0
        start, stop = microbatches[m, 2], microbatches[m, 3]
        while start < stop:
            if wave_rows[cohort, wave] == sizes[cohort]:
                wave += 1
            take = min(stop - start, sizes[cohort] - wave_rows[cohort, wave])
            segments[count, 0], segments[count, 1], segments[count, 2] = cohort, wave, microbatches[m, 1]
            segments[count, 3], segments[count, 4] = start, start + take
            wave_rows[cohort, wave] += take
            start += take
            count += 1
    return segments[:count].copy(), wave_rows, num_waves


@compiled
def layer_costs(
    segments, wave_rows, num_waves, waits, starts, first, rates, num_experts, top_k, gather, gathered, sms_left
):
    """Price the operations of a layer. gather: peers send partial sums to the owner. gathered: which waves take one
    all-gather and one reduce-scatter: 0 none, 1 all (with padding), 2 those of equal segments. sms_left:
    multiprocessors that the experts leave to collectives.
    """
    num_cohorts, most_waves = wave_rows.shape
    num_ranks = len(first) - 1
    compute = np.zeros((num_cohorts, num_ranks, 3 + most_waves, 2), np.int64)
    exchange = np.zeros((num_cohorts, 2, most_waves, 2), np.int64)
    own = np.zeros((num_cohorts, num_ranks, most_waves), np.bool_)
    ends = np.zeros((num_cohorts, num_ranks), np.int64)
    issue = np.full((num_cohorts, num_ranks), rates.host_idle_ns, np.int64)
    rows = np.zeros((num_cohorts, num_ranks), np.int64)
    pairs = np.zeros((num_cohorts, num_ranks), np.int64)
    # tokens of the sequences that begin in the cohort, and that end there
    begun = np.zeros((num_cohorts, num_ranks), np.int64)
    ended = np.zeros((num_cohorts, num_ranks), np.int64)
    busy_of, first_of = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    owned = np.zeros((num_cohorts, most_waves, num_ranks), np.int64)
    calls = np.zeros((num_cohorts, most_waves), np.int64)
    begin = np.zeros((num_cohorts, most_waves), np.int64)  # the wave's first segment
    for i in range(len(segments)):
        c, w, r, start, stop = segments[i, 0], segments[i, 1], segments[i, 2], segments[i, 3], segments[i, 4]
        own[c, r, w] = True
        owned[c, w, r] += stop - start
        rows[c, r] += stop - start
        if calls[c, w] == 0:
            begin[c, w] = i
        calls[c, w] += 1
        for s in range(first[r], first[r + 1] - 1):
            if starts[s] >= stop:
                break
            a, b = max(start, starts[s]) - starts[s], min(stop, starts[s + 1]) - starts[s]
            if a < b:
                pairs[c, r] += (b * (b + 1) - a * (a + 1)) // 2
                length = starts[s + 1] - starts[s]
                begun[c, r] += length if a == 0 else 0
                if b == length:
                    ended[c, r] += length
                    ends[c, r] += 1
    for c in range(num_cohorts):
        for w in range(num_waves[c]):
            # Ranks that share cores and memory leave padding where it is, and know no collectives.
            on_cores = rates.cores_permille > 0
            num_rows = owned[c, w].sum() if on_cores else wave_rows[c, w]
            busy = experts_busy(rates, num_rows, num_experts, top_k, num_ranks, sms_left)
            for r in range(num_ranks):
                compute[c, r, 1 + w, ALONE], compute[c, r, 1 + w, BUSY] = rates.experts_fixed_ns + busy, busy
            of_wave = segments[begin[c, w] : begin[c, w] + calls[c, w]]
            one_call = not on_cores and (
                gathered == 1 or (gathered == 2 and is_even(of_wave[:, 2], of_wave[:, 4] - of_wave[:, 3], num_ranks))
            )
            least = num_rows // num_ranks if one_call else owned[c, w].min()
            num_calls = 1 if one_call else calls[c, w]
            busy = scaled(num_rows - least, rates.dispatch_row_ps, 1000)
            exchange[c, DISPATCH, w, ALONE] = rates.dispatch_fixed_ns + num_calls * rates.dispatch_segment_ns + busy
            exchange[c, DISPATCH, w, BUSY] = busy
            moved = num_rows - (least if one_call else 0)
            if gather:
                moved, num_calls = (num_ranks - 1) * owned[c, w].max(), calls[c, w]
            busy = scaled(moved, rates.combine_row_ps, 1000)
            exchange[c, COMBINE, w, ALONE] = rates.combine_fixed_ns + num_calls * rates.combine_segment_ns + busy
            exchange[c, COMBINE, w, BUSY] = busy
        total = 0
        for r in range(num_ranks):
            busy_of[r] = 0
            if rows[c, r]:
                whole = rows[c, r] == begun[c, r] and rows[c, r] == ended[c, r]
                graph = graph_rows(rates, rows[c, r]) if whole or rates.host_graph_cuts else 0
                issue[c, r] = rates.host_graph_ns if graph else rates.host_attend_ns
                busy_of[r] = attend_busy(rates, max(graph, rows[c, r]), pairs[c, r])
                first_of[r] = first_busy(rates, max(graph, rows[c, r]), pairs[c, r])
                total += busy_of[r]
        for r in range(num_ranks):
            if rows[c, r]:
                busy = busy_of[r]
                if num_ranks > 1:
                    crowd = scaled(min(busy, (total - busy) // (num_ranks - 1)), rates.attend_crowd_permille, 1000)
                    first_of[r] += in_proportion(first_of[r], crowd, max(1, busy))
                    busy += crowd
                compute[c, r, 0, ALONE], compute[c, r, 0, BUSY] = rates.attend_fixed_ns + busy, busy
                first_busy_ns = busy + first_of[r]
                compute[c, r, FIRST_ATTEND, ALONE], compute[c, r, FIRST_ATTEND, BUSY] = (
                    rates.attend_fixed_ns + first_busy_ns,
                    first_busy_ns,
                )
                compute[c, r, FINISH, ALONE] = compute[c, r, FINISH, BUSY] = rates.finish_ns
    return LayerCosts(num_waves, compute, exchange, own, ends, waits, issue)


@compiled_look
def _alike(compute, own, issue, num_waves, a, b, parts):
    for c in range(compute.shape[0]):
        if own[c, a, 0] != own[c, b, 0]:
            return False
        for work in (0, FIRST_ATTEND):
            x, y = max(compute[c, a, work, ALONE], issue[c, a]), max(compute[c, b, work, ALONE], issue[c, b])
            if abs(x - y) * parts > max(x, y):
                return False
        for w in range(1, num_waves[c]):
            if own[c, a, w] != own[c, b, w]:
                return False
    return True


@compiled_look
def _attention(compute, r):
    total = 0
    for c in range(compute.shape[0]):
        total += compute[c, r, 0, ALONE]
    return total


@compiled_part
def merge_alike_ranks(costs, on_cores):
    """The same costs with one rank for all that are alike, and how many it stands for.

    Ranks are alike if they have rows in the same cohorts and waves and their attention differs by less than one part in
    ALIKE_PARTS. If that leaves more than MOST_RANKS, the difference does not count: the longest holds up the others. On
    cores that all ranks share, every rank counts.
    """
    of_ranks, own_of, issue_of, ends_of = costs.compute, costs.own, costs.issue, costs.ends
    num_cohorts, num_ranks, num_works = of_ranks.shape[0], of_ranks.shape[1], of_ranks.shape[2]
    class_of, chosen = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    count = 0
    for parts in (ALIKE_PARTS, 1):
        count = 0
        for r in range(num_ranks):
            k = 0
            while k < count and not _alike(of_ranks, own_of, issue_of, costs.num_waves, r, chosen[k], parts):
                k += 1
            class_of[r] = k
            if k == count:
                chosen[count] = r
                count += 1
            elif _attention(of_ranks, r) > _attention(of_ranks, chosen[k]):
                chosen[k] = r
        if count <= MOST_RANKS or on_cores:
            break
    compute = np.empty((num_cohorts, count, num_works, 2), np.int64)
    own = np.empty((num_cohorts, count, own_of.shape[2]), np.bool_)
    issue = np.empty((num_cohorts, count), np.int64)
    ends, weight = np.zeros((num_cohorts, count), np.int64), np.zeros(count, np.int64)
    for c in range(num_cohorts):
        for k in range(count):
            issue[c, k] = issue_of[c, chosen[k]]
            for w in range(num_works):
                compute[c, k, w, 0], compute[c, k, w, 1] = of_ranks[c, chosen[k], w, 0], of_ranks[c, chosen[k], w, 1]
            for w in range(own_of.shape[2]):
                own[c, k, w] = own_of[c, chosen[k], w]
        for r in range(num_ranks):
            ends[c, class_of[r]] += ends_of[c, r]
    for r in range(num_ranks):
        weight[class_of[r]] += 1
    return LayerCosts(costs.num_waves, compute, costs.exchange, own, ends, costs.waits, issue), weight
