"""The discrete-event clock that a plan runs on. Compiled, whole nanoseconds, deterministic.

Each rank has one conductor, which issues operations as pipemoe.runtime.run does: in the plan's order, passing over
cohorts that may not go on yet. Each rank has a compute lane per cohort slot. Each slot has one queue for dispatches and
one for combines; a transfer begins when every rank is ready, and ends everywhere at once. Operations side by side slow
one another by the table of contention, or share cores. A device may begin an operation that is still being issued, but
does not finish it before it is issued.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH
from pipemoe.plan.clock.rules import (
    COHORT,
    COMBINE_OP,
    DISPATCH_OP,
    HOST,
    NEVER,
    STATE,
    TRANSFER,
    Clock,
    begin_computation,
    core_shares,
    demand_of,
    is_ready,
    issue_next,
    layer_template,
    share_cores,
    share_device,
    share_links,
    slow_links,
)
from pipemoe.plan.compiled import compiled, compiled_part, compiled_rule


@compiled
def run_clock(costs, keys, slots, weight, num_layers, num_buffers, rates, speeds, computed, moved, keep):
    """Run `num_layers` layers.

    keys [C, >= n]: where a cohort's n-th operation stands in the plan's order, lowest first. slots [C]. weight [R]: how
    many ranks each column of `costs` stands for. speeds: one table of speeds_of. computed [C, R, n, 2] and
    moved [C, 2, n, 2]: filled with the begin and end of operations if `keep`. Returns finish [C, R] in ns, NEVER if the
    plan cannot get there; exposed [R], ns with communication under way and no computation; and the number of events.
    """
    clock = _new_clock(costs, keys, slots, num_layers, num_buffers)
    state, host, transfers, cohorts = clock.state, clock.host, clock.transfers, clock.cohorts
    num_ranks, num_cohorts = state.shape
    # to be looked at anew; speeds to be set anew
    touched, shared = np.ones(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)
    next_end, exposed_since = np.full(num_ranks, NEVER, np.int64), np.full(num_ranks, NEVER, np.int64)
    finish, exposed = np.full((num_cohorts, num_ranks), NEVER, np.int64), np.zeros(num_ranks, np.int64)
    beside = np.full((2, num_ranks), 1000, np.int64)
    shares = np.empty(slots.max() + 1 if num_cohorts else 0, np.int64)
    link_changed, now, events = False, 0, 0
    while True:
        events += 1
        # What begins now: issuing and computation, then transfers.
        any_shared = False
        for r in range(num_ranks):
            if touched[r]:
                if host[r].end == NEVER:
                    issue_next(clock, costs, rates, r, now)
                for c in range(num_cohorts):
                    if begin_computation(clock, costs, rates, c, r, now):
                        shared[r] = True
                        if keep:
                            computed[c, r, state[r, c].done, 0] = now
                    for side in range(2):
                        if not state[r, c].ready[side]:
                            state[r, c].ready[side] = is_ready(clock, costs, side, c, r)
                            if state[r, c].ready[side]:
                                transfers[side, c].num_ready += 1
                                shared[r] = True
            any_shared = any_shared or shared[r]
        if _begin_transfers(clock, costs, rates, moved, now, keep):
            link_changed = True
        # How fast everything runs.
        if any_shared:
            if rates.cores_permille:
                shared[:] = True
                core_shares(state, cohorts, weight, rates, shares)
            for r in range(num_ranks):
                if shared[r] and rates.cores_permille:
                    share_cores(state, cohorts, rates, shares, r, now)
                elif shared[r]:
                    share_device(state, cohorts, speeds, r, now)
                if shared[r]:
                    slow_links(state, beside, speeds, r)
        if any_shared or link_changed:
            share_links(transfers, beside, speeds, now)
            link_changed = False
        for r in range(num_ranks):
            if touched[r] or shared[r]:
                next_end[r] = host[r].end
                computing, communicating = False, False
                for c in range(num_cohorts):
                    next_end[r] = min(next_end[r], state[r, c].end)
                    computing = computing or state[r, c].active
                    communicating = communicating or state[r, c].ready[0] or state[r, c].ready[1]
                if exposed_since[r] != NEVER:
                    exposed[r] += now - exposed_since[r]
                exposed_since[r] = now if communicating and not computing else NEVER
                touched[r] = shared[r] = False
        # What ends next.
        now = NEVER
        for r in range(num_ranks):
            now = min(now, next_end[r])
        for c in range(num_cohorts):
            now = min(now, transfers[DISPATCH, c].arrival, transfers[COMBINE, c].arrival)
        if now == NEVER:
            return finish, exposed, events
        for r in range(num_ranks):
            if next_end[r] == now:
                touched[r] = True
                shared[r] = _end_on_rank(clock, costs, finish, computed, r, now, keep)
        for side in range(2):
            for c in range(num_cohorts):
                if transfers[side, c].arrival == now:
                    _end_transfer(clock, moved, side, c, now, keep)
                    link_changed = True
                    for r in range(num_ranks):
                        touched[r], shared[r] = True, True


@compiled_part
def _new_clock(costs, keys, slots, num_layers, num_buffers):
    """At the beginning: nothing is issued."""
    own = costs.own
    num_cohorts, num_ranks, most_waves = own.shape
    cohorts = np.empty(num_cohorts, COHORT)
    state, host = np.zeros((num_ranks, num_cohorts), STATE), np.zeros(num_ranks, HOST)
    transfers = np.zeros((2, num_cohorts), TRANSFER)
    templates = np.zeros((num_cohorts, 1 + 3 * most_waves, 2), np.int64)
    for c in range(num_cohorts):
        waves = costs.num_waves[c]
        cohorts[c].waves, cohorts[c].before, cohorts[c].slot = waves, -1, slots[c]
        for e in range(c):
            if slots[e] == slots[c]:
                cohorts[c].before = e
        template = layer_template(waves)
        for j in range(len(template)):
            templates[c, j, 0], templates[c, j, 1] = template[j, 0], template[j, 1]
        transfers[DISPATCH, c].arrival = transfers[COMBINE, c].arrival = NEVER
        for r in range(num_ranks):
            host[r].end, state[r, c].end, state[r, c].last_own = NEVER, NEVER, -1
            for w in range(waves):
                if own[c, r, w]:
                    state[r, c].last_own = w
    return Clock(state, host, transfers, cohorts, templates, keys, num_layers, num_buffers)


@compiled_rule
def _begin_transfers(clock, costs, rates, moved, now, keep):
    """Begin the transfers that every rank is ready for. Returns whether there are any."""
    any_begins, num_ranks = False, clock.state.shape[0]
    for side in range(2):
        for c in range(len(clock.cohorts)):
            transfer, before = clock.transfers[side, c], clock.cohorts[c].before
            if transfer.sending or transfer.layer == clock.num_layers or transfer.num_ready < num_ranks:
                continue
            if transfer.arrived > 0 or before < 0 or clock.transfers[side, before].layer == clock.num_layers:
                takes, busy = (
                    costs.exchange[c, side, transfer.wave, ALONE],
                    costs.exchange[c, side, transfer.wave, BUSY],
                )
                transfer.sending, transfer.rest, transfer.rested = True, takes, now
                transfer.pace = 0  # not yet set
                transfer.load = demand_of(takes, busy, takes, rates)
                any_begins = True
                if keep:
                    moved[c, side, transfer.arrived, 0] = now
    return any_begins


@compiled_rule
def _end_on_rank(clock, costs, finish, computed, r, now, keep):
    """End the issuing and the computations that end now on rank r. Returns whether a computation did."""
    host, any_ended = clock.host[r], False
    if host.end == now:
        if host.kind == DISPATCH_OP:
            clock.state[r, host.cohort].posted[DISPATCH] += 1
        elif host.kind == COMBINE_OP:
            clock.state[r, host.cohort].posted[COMBINE] += 1
        host.end = NEVER
    for c in range(len(clock.cohorts)):
        state = clock.state[r, c]
        if state.end == now:
            if keep:
                computed[c, r, state.done, 1] = now
            state.done += 1
            state.active, state.end, any_ended = False, NEVER, True
            state.work_place += 1
            if state.work_layer == clock.num_layers:
                finish[c, r] = now
            if state.work_layer == clock.num_layers or state.work_place > clock.cohorts[c].waves:
                state.work_layer += 1
                state.work_place = 0
    return any_ended


@compiled_rule
def _end_transfer(clock, moved, side, c, now, keep):
    """End a transfer on all ranks, and go on to the cohort's next one."""
    transfer, cohort = clock.transfers[side, c], clock.cohorts[c]
    if keep:
        moved[c, side, transfer.arrived, 1] = now
    transfer.arrived += 1
    transfer.wave += 1
    if transfer.wave == cohort.waves:
        transfer.layer += 1
        transfer.wave = 0
    transfer.sending, transfer.arrival, transfer.num_ready = False, NEVER, 0
    for r in range(clock.state.shape[0]):
        clock.state[r, c].ready[side] = False
