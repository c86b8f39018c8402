"""The discrete-event clock that a plan is run on. Compiled, whole nanoseconds, deterministic.

Per rank one engine thread issues operations as pipemoe.runtime.run does: cohort by cohort in the plan's order, passing
over those that may not go on yet. Per cohort slot and rank a compute lane, per slot one queue for dispatches and one
for combines, which begin when every rank is ready and end everywhere at once. What runs side by side slows one another
by the table of contention, or shares cores. A device works on what is still being issued, but is not done before the
issuing is.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH
from pipemoe.plan.clock.rules import (
    ACTIVE,
    ARRIVAL,
    ARRIVED,
    BEFORE,
    BLOCKS,
    COMBINE_OP,
    DEMAND,
    DISPATCH_OP,
    DONE,
    END,
    GROUPS,
    HOST_COHORT,
    HOST_END,
    HOST_KIND,
    LAST_OWN,
    LAYER,
    LOAD,
    NEVER,
    NUM_READY,
    PACE,
    POSTED,
    READY,
    REST,
    RESTED,
    SENDING,
    SLOT,
    WAVE,
    WAVES,
    WORK_LAYER,
    WORK_PLACE,
    WORKS,
    begin_computation,
    demand_of,
    is_ready,
    issue_next,
    layer_template,
    share_cores,
    share_device,
    share_links,
    slow_links,
)
from pipemoe.plan.compiled import compiled


@compiled
def run_clock(costs, keys, slots, weight, num_layers, num_buffers, rates, speeds, computed, moved, keep):
    """Run `num_layers` layers. keys [C, >= n]: where a cohort's n-th operation stands in the plan's order; lowest
    first. slots [C]. speeds: of speeds_of. weight [R]: ranks that each column of `costs` stands for. computed [C, R, n,
    2], moved [C, 2, n, 2]: filled with begin and end of operations if `keep`. Returns finish [C, R] and exposed [R]
    (communication under way, no computation), in ns, and the number of events on the clock.

    finish holds NEVER where the plan can never get there.
    """
    compute, exchange, own, waits = costs.compute, costs.exchange, costs.own, costs.waits
    num_cohorts, num_ranks, num_blocks, num_heads = (
        compute.shape[0],
        compute.shape[1],
        costs.num_blocks,
        costs.num_heads,
    )
    cohorts = np.empty((6, num_cohorts), np.int64)
    state, host = np.zeros((num_ranks, num_cohorts, 18), np.int64), np.zeros((3, num_ranks), np.int64)
    transfers = np.zeros((2, 10, num_cohorts), np.int64)
    templates = np.zeros((num_cohorts, 1 + 3 * own.shape[2], 2), np.int64)
    for c in range(num_cohorts):
        cohorts[WAVES, c], cohorts[BEFORE, c], cohorts[SLOT, c] = costs.num_waves[c], -1, slots[c]
        cohorts[BLOCKS, c], cohorts[WORKS, c] = (
            costs.num_waves[c] * num_blocks,
            costs.num_waves[c] * (num_heads + num_blocks),
        )
        cohorts[GROUPS, c] = costs.groups[c]
        for e in range(c):
            if slots[e] == slots[c]:
                cohorts[BEFORE, c] = e
        template = layer_template(cohorts[WAVES, c])
        for j in range(len(template)):
            templates[c, j, 0], templates[c, j, 1] = template[j, 0], template[j, 1]
        transfers[DISPATCH, ARRIVAL, c] = transfers[COMBINE, ARRIVAL, c] = NEVER
        for r in range(num_ranks):
            host[HOST_END, r], state[r, c, END], state[r, c, LAST_OWN] = NEVER, NEVER, -1
            for w in range(cohorts[WAVES, c]):
                if own[c, r, w]:
                    state[r, c, LAST_OWN] = (w + 1) * num_blocks - 1
    # looked at anew; speeds to be set anew
    touched, shared = np.ones(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)
    next_end, exposed_since = np.full(num_ranks, NEVER, np.int64), np.full(num_ranks, NEVER, np.int64)
    finish, exposed = np.full((num_cohorts, num_ranks), NEVER, np.int64), np.zeros(num_ranks, np.int64)
    beside = np.full((2, num_ranks), 1000, np.int64)
    link_changed, now, events = False, 0, 0
    while True:
        events += 1
        # What begins now: issuing and computation, then transfers.
        any_shared = False
        for r in range(num_ranks):
            if touched[r]:
                if host[HOST_END, r] == NEVER:
                    issue_next(
                        state,
                        host,
                        transfers,
                        cohorts,
                        templates,
                        waits,
                        own,
                        costs.issue,
                        keys,
                        rates,
                        num_layers,
                        num_blocks,
                        num_heads,
                        r,
                        now,
                    )
                for c in range(num_cohorts):
                    if begin_computation(
                        state,
                        host,
                        transfers,
                        cohorts,
                        waits,
                        compute,
                        rates,
                        num_layers,
                        num_buffers,
                        num_blocks,
                        num_heads,
                        c,
                        r,
                        now,
                    ):
                        shared[r] = True
                        if keep:
                            computed[c, r, state[r, c, DONE], 0] = now
                    for side in range(2):
                        if not state[r, c, READY + side]:
                            state[r, c, READY + side] = is_ready(
                                state, transfers, cohorts, own, num_buffers, num_blocks, num_heads, side, c, r
                            )
                            if state[r, c, READY + side]:
                                transfers[side, NUM_READY, c] += 1
                                shared[r] = True
            any_shared = any_shared or shared[r]
        for side in range(2):
            for c in range(num_cohorts):
                n, before = transfers[side, ARRIVED, c], cohorts[BEFORE, c]
                if (
                    transfers[side, SENDING, c]
                    or transfers[side, LAYER, c] == num_layers
                    or transfers[side, NUM_READY, c] < num_ranks
                ):
                    continue
                if n > 0 or before < 0 or transfers[side, LAYER, before] == num_layers:
                    takes = exchange[c, side, transfers[side, WAVE, c], ALONE]
                    transfers[side, SENDING, c], transfers[side, REST, c], transfers[side, RESTED, c], link_changed = (
                        True,
                        takes,
                        now,
                        True,
                    )
                    transfers[side, PACE, c] = 0  # not yet set
                    transfers[side, LOAD, c] = demand_of(
                        takes, exchange[c, side, transfers[side, WAVE, c], BUSY], takes, rates
                    )
                    if keep:
                        moved[c, side, n, 0] = now
        # How fast everything goes on.
        if any_shared:
            total = 0
            if rates.cores_permille:
                for r in range(num_ranks):
                    shared[r] = True
                    for c in range(num_cohorts):
                        total += weight[r] * state[r, c, DEMAND] if state[r, c, ACTIVE] else 0
            for r in range(num_ranks):
                if shared[r] and rates.cores_permille:
                    share_cores(state, rates, total, r, now)
                elif shared[r]:
                    share_device(state, cohorts, speeds, r, now)
                if shared[r]:
                    slow_links(state, beside, speeds, r)
        if any_shared or link_changed:
            share_links(transfers, beside, speeds, now)
            link_changed = False
        for r in range(num_ranks):
            if touched[r] or shared[r]:
                next_end[r] = host[HOST_END, r]
                computing, communicating = False, False
                for c in range(num_cohorts):
                    next_end[r] = min(next_end[r], state[r, c, END])
                    computing = computing or state[r, c, ACTIVE]
                    communicating = communicating or state[r, c, READY + 0] or state[r, c, READY + 1]
                if exposed_since[r] != NEVER:
                    exposed[r] += now - exposed_since[r]
                exposed_since[r] = now if communicating and not computing else NEVER
                touched[r] = shared[r] = False
        # What ends next.
        now = NEVER
        for r in range(num_ranks):
            now = min(now, next_end[r])
        for c in range(num_cohorts):
            now = min(now, transfers[DISPATCH, ARRIVAL, c], transfers[COMBINE, ARRIVAL, c])
        if now == NEVER:
            return finish, exposed, events
        for r in range(num_ranks):
            if next_end[r] != now:
                continue
            touched[r] = True
            if host[HOST_END, r] == now:
                kind, c = host[HOST_KIND, r], host[HOST_COHORT, r]
                if kind == DISPATCH_OP:
                    state[r, c, POSTED + DISPATCH] += 1
                elif kind == COMBINE_OP:
                    state[r, c, POSTED + COMBINE] += num_blocks
                host[HOST_END, r] = NEVER
            for c in range(num_cohorts):
                if state[r, c, END] == now:
                    if keep:
                        computed[c, r, state[r, c, DONE], 1] = now
                    state[r, c, DONE] += 1
                    state[r, c, ACTIVE], state[r, c, END], shared[r] = False, NEVER, True
                    state[r, c, WORK_PLACE] += 1
                    if state[r, c, WORK_LAYER] == num_layers:
                        finish[c, r] = now
                    if state[r, c, WORK_LAYER] == num_layers or state[r, c, WORK_PLACE] > cohorts[WORKS, c]:
                        state[r, c, WORK_LAYER] += 1
                        state[r, c, WORK_PLACE] = 0
        for side in range(2):
            for c in range(num_cohorts):
                if transfers[side, ARRIVAL, c] == now:
                    if keep:
                        moved[c, side, transfers[side, ARRIVED, c], 1] = now
                    transfers[side, ARRIVED, c] += 1
                    transfers[side, WAVE, c] += 1
                    if transfers[side, WAVE, c] == cohorts[WAVES if side == DISPATCH else BLOCKS, c]:
                        transfers[side, LAYER, c] += 1
                        transfers[side, WAVE, c] = 0
                    transfers[side, SENDING, c], transfers[side, ARRIVAL, c], transfers[side, NUM_READY, c] = (
                        False,
                        NEVER,
                        0,
                    )
                    link_changed = True
                    for r in range(num_ranks):
                        state[r, c, READY + side], touched[r], shared[r] = False, True, True
