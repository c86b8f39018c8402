"""The discrete-event clock that a plan is run on. Compiled, whole nanoseconds, deterministic.

Per rank one engine thread issues operations as pipemoe.runtime.run does: cohort by cohort in the plan's order, passing over those
that may not go on yet. Per cohort slot and rank a compute lane, per slot one queue for dispatches and one for combines, which
begin when every rank is ready and end everywhere at once. Computation that runs side by side shares its rank (or all cores),
transfers share the link. A device works on what is still being issued, but is not done before the issuing is.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pipemoe.plan.layer_costs import ALONE, BUSY, COMBINE, DISPATCH
from pipemoe.plan.schedule import MAX_GROUPS

NEVER = 1 << 60
ATTEND_OP, DISPATCH_OP, EXPERTS_OP, COMBINE_OP, FINISH_OP = 0, 1, 2, 3, 4  # values of OpKind

# The state is a few arrays, not an object: compiled code counts references to every array that it passes on. Layers, places and
# waves are counted along, not divided out: divisions would take most of the time.
# state [., C, R], of C cohorts on R ranks; speeds in thousandths:
LAST_OWN = 0  # last wave that holds rows of the rank, or -1
ISSUED = 1  # operations
QUEUED = 2  # computations issued
POSTED = 3  # dispatches issued; POSTED + 1: combines
READY = 5  # the rank has what its part of the next dispatch needs; READY + 1: combine
DONE = 7  # computations
ACTIVE = 8  # a computation is under way
LEFT = 9  # ns at full speed that it had left
SINCE = 10  # at this time
DEMAND = 11  # share of the device that it takes by itself, in thousandths
SPEED = 12
END = 13  # when it will end at that speed, or NEVER
ISSUE_LAYER, ISSUE_PLACE = 14, 15  # of the next operation to issue: its layer, and its place in layer_template
WORK_LAYER, WORK_PLACE = 16, 17  # of the next computation: its layer; 0 attend or finish, 1 + wave experts
# host [., R]: the operation that the rank's engine is issuing
HOST_END, HOST_KIND, HOST_COHORT = 0, 1, 2
# transfers [2, ., C]: of dispatches and of combines
ARRIVED = 0  # complete
SENDING = 1  # one is under way
REST = 2  # ns at full speed that it has left
LOAD = 3  # share of the link that it takes by itself
ARRIVAL = 4  # when it will arrive, or NEVER
LAYER, WAVE = 5, 6  # of the next one
# cohorts [2, C]
WAVES = 0
BEFORE = 1  # the cohort that had the slot, or -1


@njit(cache=True, error_model="numpy")
def layer_template(num_waves):
    """One layer of a cohort, [1 + 3 W, 2] = kind, wave; the dispatch of a wave goes ahead of the experts of the one before."""
    template = np.empty((1 + 3 * num_waves, 2), np.int64)
    template[0, 0], template[0, 1] = ATTEND_OP, 0
    template[1, 0], template[1, 1] = DISPATCH_OP, 0
    at = 2
    for w in range(num_waves):
        if w + 1 < num_waves:
            template[at, 0], template[at, 1] = DISPATCH_OP, w + 1
            at += 1
        template[at, 0], template[at, 1] = EXPERTS_OP, w
        template[at + 1, 0], template[at + 1, 1] = COMBINE_OP, w
        at += 2
    return template


@njit(cache=True, error_model="numpy", _nrt=False)
def _issue(state, host, transfers, cohorts, templates, causal, own, keys, rates, num_layers, r, now):
    """Let rank r's engine take the first operation in the plan's order that may be issued, if there is one."""
    best, best_key, best_kind = -1, NEVER, 0
    for c in range(cohorts.shape[1]):
        layer, place = state[ISSUE_LAYER, c, r], state[ISSUE_PLACE, c, r]
        if layer > num_layers or keys[c, state[ISSUED, c, r]] >= best_key:
            continue
        kind = FINISH_OP if layer == num_layers else templates[c, place, 0]
        may = True
        if kind == DISPATCH_OP:
            may = state[POSTED + DISPATCH, c, r] - transfers[DISPATCH, ARRIVED, c] < MAX_GROUPS
        elif kind == ATTEND_OP:
            before = cohorts[BEFORE, c]
            if layer == 0 and before >= 0:
                may = state[ISSUE_LAYER, before, r] > num_layers
            for e in range(cohorts.shape[1]):
                if causal[c, e] and state[ISSUE_LAYER, e, r] <= layer and (state[ISSUE_LAYER, e, r] < layer or state[ISSUE_PLACE, e, r] == 0):
                    may = False
        if may:
            best, best_key, best_kind = c, keys[c, state[ISSUED, c, r]], kind
    if best < 0:
        return
    c, kind, wave = best, best_kind, templates[best, state[ISSUE_PLACE, best, r], 1]
    owner = state[LAST_OWN, c, r] >= 0
    if kind == ATTEND_OP:
        takes = rates.host_attend_ns if owner else rates.host_idle_ns
    elif kind == DISPATCH_OP:
        takes = rates.host_dispatch_ns + (rates.host_pack_ns if own[c, r, wave] else 0)
    elif kind == EXPERTS_OP:
        takes = rates.host_experts_ns
    elif kind == COMBINE_OP:
        takes = rates.host_combine_ns
    else:
        takes = rates.host_finish_ns if owner else rates.host_idle_ns
    state[ISSUED, c, r] += 1
    state[ISSUE_PLACE, c, r] += 1
    if kind == FINISH_OP or state[ISSUE_PLACE, c, r] == 1 + 3 * cohorts[WAVES, c]:
        state[ISSUE_LAYER, c, r] += 1
        state[ISSUE_PLACE, c, r] = 0
    host[HOST_END, r], host[HOST_KIND, r], host[HOST_COHORT, r] = now + takes, kind, c
    if kind != DISPATCH_OP and kind != COMBINE_OP:
        state[QUEUED, c, r] += 1


@njit(cache=True, error_model="numpy", _nrt=False)
def _has_arrived(transfers, side, c, layer, wave):
    now_in = transfers[side, LAYER, c]
    return now_in > layer or (now_in == layer and transfers[side, WAVE, c] > wave)


@njit(cache=True, error_model="numpy", _nrt=False)
def _earlier(layer, wave, count, waves):
    """Layer and wave `count` waves earlier; the layer is negative where there is none."""
    wave -= count
    while wave < 0:
        wave, layer = wave + waves, layer - 1
    return layer, wave


@njit(cache=True, error_model="numpy", _nrt=False)
def _begin_computation(state, host, transfers, cohorts, causal, compute, num_layers, num_buffers, c, r, now):
    """Begin the next computation of cohort c on rank r if it may; returns whether."""
    op, before = state[DONE, c, r], cohorts[BEFORE, c]
    if state[ACTIVE, c, r] or state[QUEUED, c, r] <= op or (op == 0 and before >= 0 and state[WORK_LAYER, before, r] <= num_layers):
        return False
    layer, work = state[WORK_LAYER, c, r], state[WORK_PLACE, c, r]
    if work == 0:  # attend or finish
        if layer and state[LAST_OWN, c, r] >= 0 and not _has_arrived(transfers, COMBINE, c, layer - 1, state[LAST_OWN, c, r]):
            return False
        if layer == num_layers:
            work = compute.shape[2] - 1
        else:
            for e in range(cohorts.shape[1]):
                if causal[c, e] and state[WORK_LAYER, e, r] <= layer and (state[WORK_LAYER, e, r] < layer or state[WORK_PLACE, e, r] == 0):
                    return False
    else:
        if not _has_arrived(transfers, DISPATCH, c, layer, work - 1):
            return False
        before_layer, before_wave = _earlier(layer, work - 1, num_buffers, cohorts[WAVES, c])
        if before_layer >= 0 and not _has_arrived(transfers, COMBINE, c, before_layer, before_wave):
            return False
    takes = compute[c, r, work, ALONE]
    issuing = host[HOST_END, r] != NEVER and host[HOST_COHORT, r] == c and host[HOST_KIND, r] % 2 == 0 and state[QUEUED, c, r] == op + 1
    if issuing:
        takes = max(takes, host[HOST_END, r] - now)
    state[ACTIVE, c, r], state[LEFT, c, r], state[SINCE, c, r] = True, takes, now
    state[DEMAND, c, r] = 1000 * compute[c, r, work, BUSY] // takes if takes else 0
    state[SPEED, c, r] = 1000
    return True


@njit(cache=True, error_model="numpy", _nrt=False)
def _share(state, rates, total, r, now):
    """Set the speeds of rank r's computations anew. total: demand of all ranks, for cores that all ranks share."""
    beside, wanted = 0, 0
    for c in range(state.shape[1]):
        if state[ACTIVE, c, r]:
            beside += 1
            wanted += state[DEMAND, c, r]
    if rates.sharing_across_ranks:
        wanted = total
    capacity = rates.sharing_capacity_permille
    slowed = 1000 + rates.sharing_slowdown_permille * (beside - 1)
    for c in range(state.shape[1]):
        if not state[ACTIVE, c, r]:
            continue
        state[LEFT, c, r] = max(0, state[LEFT, c, r] - (now - state[SINCE, c, r]) * state[SPEED, c, r] // 1000)
        state[SINCE, c, r] = now
        share = 1000
        if wanted > rates.sharing_capacity_permille:
            if rates.sharing_priority and not rates.sharing_across_ranks:
                given = min(state[DEMAND, c, r], capacity)
                capacity -= given
                share = max(100, 1000 * given // state[DEMAND, c, r]) if state[DEMAND, c, r] else 1000  # blocks trickle in between
            else:
                share = max(1, 1000 * capacity // wanted)
        state[SPEED, c, r] = max(1, share * 1000 // slowed)
        state[END, c, r] = now + (state[LEFT, c, r] * 1000 + state[SPEED, c, r] - 1) // state[SPEED, c, r]


@njit(cache=True, error_model="numpy", _nrt=False)
def _is_ready(state, transfers, cohorts, own, num_buffers, side, c, r):
    """Has rank r what its part of cohort c's next transfer needs?"""
    if state[POSTED + side, c, r] <= transfers[side, ARRIVED, c]:
        return False
    layer, wave = transfers[side, LAYER, c], transfers[side, WAVE, c]
    work_layer, work_place = state[WORK_LAYER, c, r], state[WORK_PLACE, c, r]
    if side == COMBINE:
        return work_layer > layer or (work_layer == layer and work_place > 1 + wave)
    if own[c, r, wave] and (work_layer < layer or (work_layer == layer and work_place == 0)):
        return False
    layer, wave = _earlier(layer, wave, num_buffers, cohorts[WAVES, c])  # of the buffer's reader before
    return layer < 0 or work_layer > layer or (work_layer == layer and work_place > 1 + wave)


@njit(cache=True, error_model="numpy")
def run_clock(costs, keys, slots, weight, num_layers, num_buffers, rates, computed, moved, keep):
    """Run `num_layers` layers. keys [C, >= n]: where a cohort's n-th operation stands in the plan's order; lowest first. slots [C].
    weight [R]: ranks that each column of `costs` stands for. computed [C, R, n, 2], moved [C, 2, n, 2]: filled with begin and
    end of operations if `keep`. Returns finish [C, R] and exposed [R] (communication under way, no computation), in ns.

    finish holds NEVER where the plan can never get there.
    """
    compute, exchange, own, causal = costs.compute, costs.exchange, costs.own, costs.causal
    num_cohorts, num_ranks = compute.shape[0], compute.shape[1]
    cohorts = np.empty((2, num_cohorts), np.int64)
    state, host = np.zeros((18, num_cohorts, num_ranks), np.int64), np.zeros((3, num_ranks), np.int64)
    transfers = np.zeros((2, 7, num_cohorts), np.int64)
    templates = np.zeros((num_cohorts, 1 + 3 * (compute.shape[2] - 2), 2), np.int64)
    for c in range(num_cohorts):
        cohorts[WAVES, c], cohorts[BEFORE, c] = costs.num_waves[c], -1
        for e in range(c):
            if slots[e] == slots[c]:
                cohorts[BEFORE, c] = e
        template = layer_template(cohorts[WAVES, c])
        for j in range(len(template)):
            templates[c, j, 0], templates[c, j, 1] = template[j, 0], template[j, 1]
        transfers[DISPATCH, ARRIVAL, c] = transfers[COMBINE, ARRIVAL, c] = NEVER
        for r in range(num_ranks):
            host[HOST_END, r], state[END, c, r], state[LAST_OWN, c, r] = NEVER, NEVER, -1
            for w in range(cohorts[WAVES, c]):
                if own[c, r, w]:
                    state[LAST_OWN, c, r] = w
    touched, shared = np.ones(num_ranks, np.bool_), np.zeros(num_ranks, np.bool_)  # looked at anew; speeds to be set anew
    next_end, exposed_since = np.full(num_ranks, NEVER, np.int64), np.full(num_ranks, NEVER, np.int64)
    finish, exposed = np.full((num_cohorts, num_ranks), NEVER, np.int64), np.zeros(num_ranks, np.int64)
    link_speed, link_since, link_changed, now = 1000, 0, False, 0
    while True:
        # What begins now: issuing and computation, then transfers.
        any_shared = False
        for r in range(num_ranks):
            if touched[r]:
                if host[HOST_END, r] == NEVER:
                    _issue(state, host, transfers, cohorts, templates, causal, own, keys, rates, num_layers, r, now)
                for c in range(num_cohorts):
                    if _begin_computation(state, host, transfers, cohorts, causal, compute, num_layers, num_buffers, c, r, now):
                        shared[r] = True
                        if keep:
                            computed[c, r, state[DONE, c, r], 0] = now
                    for side in range(2):
                        if not state[READY + side, c, r]:
                            state[READY + side, c, r] = _is_ready(state, transfers, cohorts, own, num_buffers, side, c, r)
            any_shared = any_shared or shared[r]
        for side in range(2):
            for c in range(num_cohorts):
                n, before = transfers[side, ARRIVED, c], cohorts[BEFORE, c]
                if transfers[side, SENDING, c] or transfers[side, LAYER, c] == num_layers:
                    continue
                everywhere = n > 0 or before < 0 or transfers[side, LAYER, before] == num_layers
                for r in range(num_ranks):
                    everywhere = everywhere and state[READY + side, c, r]
                if everywhere:
                    takes = exchange[c, side, transfers[side, WAVE, c], ALONE]
                    transfers[side, SENDING, c], transfers[side, REST, c], link_changed = True, takes, True
                    # Its share of the link begins when all shares are set anew below.
                    transfers[side, REST, c] += (now - link_since) * link_speed // 1000
                    transfers[side, LOAD, c] = 1000 * exchange[c, side, transfers[side, WAVE, c], BUSY] // takes if takes else 0
                    if keep:
                        moved[c, side, n, 0] = now
        # How fast everything goes on.
        if any_shared:
            total = 0
            if rates.sharing_across_ranks:
                for r in range(num_ranks):
                    shared[r] = True
                    for c in range(num_cohorts):
                        total += weight[r] * state[DEMAND, c, r] if state[ACTIVE, c, r] else 0
            for r in range(num_ranks):
                if shared[r]:
                    _share(state, rates, total, r, now)
        for r in range(num_ranks):
            if touched[r] or shared[r]:
                next_end[r] = host[HOST_END, r]
                computing, communicating = False, False
                for c in range(num_cohorts):
                    next_end[r] = min(next_end[r], state[END, c, r])
                    computing = computing or state[ACTIVE, c, r]
                    communicating = communicating or state[READY + 0, c, r] or state[READY + 1, c, r]
                if exposed_since[r] != NEVER:
                    exposed[r] += now - exposed_since[r]
                exposed_since[r] = now if communicating and not computing else NEVER
                touched[r] = shared[r] = False
        if link_changed:
            carried, count = 0, 0
            for side in range(2):
                for c in range(num_cohorts):
                    if transfers[side, SENDING, c]:
                        carried, count = carried + transfers[side, LOAD, c], count + 1
            passed = (now - link_since) * link_speed // 1000
            link_speed = min(1000, 1000 * rates.sharing_link_permille // carried) if carried else 1000
            link_speed = max(1, link_speed * 1000 // (1000 + rates.sharing_exchange_slowdown_permille * max(0, count - 1)))
            link_since, link_changed = now, False
            for side in range(2):
                for c in range(num_cohorts):
                    if transfers[side, SENDING, c]:
                        transfers[side, REST, c] = max(0, transfers[side, REST, c] - passed)
                        transfers[side, ARRIVAL, c] = now + (transfers[side, REST, c] * 1000 + link_speed - 1) // link_speed
        # What ends next.
        now = NEVER
        for r in range(num_ranks):
            now = min(now, next_end[r])
        for c in range(num_cohorts):
            now = min(now, transfers[DISPATCH, ARRIVAL, c], transfers[COMBINE, ARRIVAL, c])
        if now == NEVER:
            return finish, exposed
        for r in range(num_ranks):
            if next_end[r] != now:
                continue
            touched[r] = True
            if host[HOST_END, r] == now:
                kind, c = host[HOST_KIND, r], host[HOST_COHORT, r]
                if kind == DISPATCH_OP:
                    state[POSTED + DISPATCH, c, r] += 1
                elif kind == COMBINE_OP:
                    state[POSTED + COMBINE, c, r] += 1
                host[HOST_END, r] = NEVER
            for c in range(num_cohorts):
                if state[END, c, r] == now:
                    if keep:
                        computed[c, r, state[DONE, c, r], 1] = now
                    state[DONE, c, r] += 1
                    state[ACTIVE, c, r], state[END, c, r], shared[r] = False, NEVER, True
                    state[WORK_PLACE, c, r] += 1
                    if state[WORK_LAYER, c, r] == num_layers:
                        finish[c, r] = now
                    if state[WORK_LAYER, c, r] == num_layers or state[WORK_PLACE, c, r] > cohorts[WAVES, c]:
                        state[WORK_LAYER, c, r] += 1
                        state[WORK_PLACE, c, r] = 0
        for side in range(2):
            for c in range(num_cohorts):
                if transfers[side, ARRIVAL, c] == now:
                    if keep:
                        moved[c, side, transfers[side, ARRIVED, c], 1] = now
                    transfers[side, ARRIVED, c] += 1
                    transfers[side, WAVE, c] += 1
                    if transfers[side, WAVE, c] == cohorts[WAVES, c]:
                        transfers[side, LAYER, c] += 1
                        transfers[side, WAVE, c] = 0
                    transfers[side, SENDING, c], transfers[side, ARRIVAL, c], link_changed = False, NEVER, True
                    for r in range(num_ranks):
                        state[READY + side, c, r], touched[r] = False, True
