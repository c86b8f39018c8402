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


@njit(cache=True, error_model="numpy")
def _host_ns(rates, kind, owns):
    if kind == ATTEND_OP:
        return rates.host_attend_ns if owns else rates.host_idle_ns
    if kind == DISPATCH_OP:
        return rates.host_dispatch_ns + (rates.host_pack_ns if owns else 0)
    if kind == EXPERTS_OP:
        return rates.host_experts_ns
    if kind == COMBINE_OP:
        return rates.host_combine_ns
    return rates.host_finish_ns if owns else rates.host_idle_ns


@njit(cache=True, error_model="numpy")
def _work_of(op, num_waves, most_waves, num_layers):
    """Where in LayerCosts.compute a cohort's `op`-th computation stands: 0 attend, 1 + wave experts, 1 + W finish."""
    return 1 + most_waves if op == num_layers * (1 + num_waves) else op % (1 + num_waves)


@njit(cache=True, error_model="numpy")
def _share_rates(active, demand, speed, weight, rates):
    """Set the speed, in thousandths, of all active computations [C, R]."""
    num_cohorts, num_ranks = active.shape
    total = 0
    for r in range(num_ranks):
        for c in range(num_cohorts):
            if active[c, r]:
                total += weight[r] * demand[c, r]
    for r in range(num_ranks):
        beside, wanted = 0, 0
        for c in range(num_cohorts):
            if active[c, r]:
                beside += 1
                wanted += demand[c, r]
        if rates.sharing_across_ranks:
            wanted = total
        left, slowed = rates.sharing_capacity_permille, 1000 + rates.sharing_slowdown_permille * (beside - 1)
        for c in range(num_cohorts):
            if not active[c, r]:
                continue
            share = 1000
            if wanted > rates.sharing_capacity_permille:
                if rates.sharing_priority and not rates.sharing_across_ranks:
                    given = min(demand[c, r], left)
                    left -= given
                    share = max(100, 1000 * given // demand[c, r]) if demand[c, r] else 1000  # blocks trickle in between
                else:
                    share = max(1, 1000 * rates.sharing_capacity_permille // wanted)
            speed[c, r] = max(1, share * 1000 // slowed)


@njit(cache=True, error_model="numpy")
def run_clock(costs, keys, slots, weight, num_layers, num_buffers, rates, computed, moved, keep):
    """Run `num_layers` layers. keys [C, >= n]: when a cohort's n-th operation stands in the plan's order; lowest first. slots [C].
    weight [R]: ranks that each column of `costs` stands for. computed [C, R, n, 2], moved [C, 2, n, 2]: filled with begin and
    end of operations if `keep`. Returns finish [C, R] and exposed [R] (communication under way, no computation), in ns.

    finish holds NEVER where the plan can never get there.
    """
    num_waves, compute, exchange, own = costs.num_waves, costs.compute, costs.exchange, costs.own
    num_cohorts, num_ranks, most = compute.shape[0], compute.shape[1], compute.shape[2] - 2
    templates = np.zeros((num_cohorts, 1 + 3 * most, 2), np.int64)
    total_ops, total_computed, total_moved = np.empty(num_cohorts, np.int64), np.empty(num_cohorts, np.int64), np.empty(num_cohorts, np.int64)
    before = np.full(num_cohorts, -1, np.int64)  # the cohort that had the slot
    last_own = np.full((num_cohorts, num_ranks), -1, np.int64)
    for c in range(num_cohorts):
        waves = num_waves[c]
        template = layer_template(waves)
        for j in range(len(template)):
            templates[c, j, 0], templates[c, j, 1] = template[j, 0], template[j, 1]
        total_ops[c], total_computed[c], total_moved[c] = num_layers * (1 + 3 * waves) + 1, num_layers * (1 + waves) + 1, num_layers * waves
        for e in range(c):
            if slots[e] == slots[c]:
                before[c] = e
        for r in range(num_ranks):
            for w in range(waves):
                if own[c, r, w]:
                    last_own[c, r] = w
    issued = np.zeros((num_cohorts, num_ranks), np.int64)
    queued = np.zeros((num_cohorts, num_ranks), np.int64)  # computations issued
    posted = np.zeros((2, num_cohorts, num_ranks), np.int64)  # dispatches, combines issued
    host_end = np.full(num_ranks, NEVER, np.int64)
    host_kind, host_cohort = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    done = np.zeros((num_cohorts, num_ranks), np.int64)  # computations
    active = np.zeros((num_cohorts, num_ranks), np.bool_)
    left, demand = np.zeros((num_cohorts, num_ranks), np.int64), np.zeros((num_cohorts, num_ranks), np.int64)
    speed, end = np.zeros((num_cohorts, num_ranks), np.int64), np.full((num_cohorts, num_ranks), NEVER, np.int64)
    arrived = np.zeros((2, num_cohorts), np.int64)  # transfers complete
    ready = np.zeros((2, num_cohorts, num_ranks), np.bool_)
    sending = np.zeros((2, num_cohorts), np.bool_)
    rest, load, arrival = np.zeros((2, num_cohorts), np.int64), np.zeros((2, num_cohorts), np.int64), np.full((2, num_cohorts), NEVER, np.int64)
    finish = np.full((num_cohorts, num_ranks), NEVER, np.int64)
    exposed = np.zeros(num_ranks, np.int64)
    link_speed, now, changed = 1000, 0, False
    while True:
        # What begins now: issuing, then computation, then transfers.
        for r in range(num_ranks):
            if host_end[r] != NEVER:
                continue
            best, best_key = -1, NEVER
            for c in range(num_cohorts):
                n = issued[c, r]
                if n == total_ops[c] or keys[c, n] >= best_key:
                    continue
                size = 1 + 3 * num_waves[c]
                kind = FINISH_OP if n == total_ops[c] - 1 else templates[c, n % size, 0]
                may = True
                if kind == DISPATCH_OP:
                    may = posted[DISPATCH, c, r] - arrived[DISPATCH, c] < MAX_GROUPS
                elif kind == ATTEND_OP:
                    if n == 0 and before[c] >= 0:
                        may = issued[before[c], r] == total_ops[before[c]]
                    for e in range(num_cohorts):
                        if costs.causal[c, e] and issued[e, r] <= n // size * (1 + 3 * num_waves[e]):
                            may = False
                if may:
                    best, best_key = c, keys[c, n]
            if best < 0:
                continue
            c, n = best, issued[best, r]
            last = n == total_ops[c] - 1
            place = n % (1 + 3 * num_waves[c])
            kind = FINISH_OP if last else templates[c, place, 0]
            owns = own[c, r, templates[c, place, 1]] if kind == DISPATCH_OP else last_own[c, r] >= 0
            issued[c, r] += 1
            host_end[r], host_kind[r], host_cohort[r] = now + _host_ns(rates, kind, owns), kind, c
            if kind != DISPATCH_OP and kind != COMBINE_OP:
                queued[c, r] += 1
        for c in range(num_cohorts):
            waves = num_waves[c]
            for r in range(num_ranks):
                op = done[c, r]
                if active[c, r] or queued[c, r] <= op or (op == 0 and before[c] >= 0 and done[before[c], r] < total_computed[before[c]]):
                    continue
                layer, place = op // (1 + waves), op % (1 + waves)
                if place == 0:
                    if last_own[c, r] >= 0 and layer > 0 and arrived[COMBINE, c] <= (layer - 1) * waves + last_own[c, r]:
                        continue
                    blocked = False
                    if op < total_computed[c] - 1:
                        for e in range(num_cohorts):
                            if costs.causal[c, e] and done[e, r] <= layer * (1 + num_waves[e]):
                                blocked = True
                    if blocked:
                        continue
                else:
                    transfer = layer * waves + place - 1
                    if arrived[DISPATCH, c] <= transfer or arrived[COMBINE, c] <= transfer - num_buffers:
                        continue
                work = _work_of(op, waves, most, num_layers)
                left[c, r] = compute[c, r, work, ALONE]
                issuing = host_end[r] != NEVER and host_cohort[r] == c and host_kind[r] % 2 == 0 and queued[c, r] == op + 1
                if issuing:
                    left[c, r] = max(left[c, r], host_end[r] - now)
                demand[c, r] = 1000 * compute[c, r, work, BUSY] // left[c, r] if left[c, r] else 0
                active[c, r], changed = True, True
                if keep:
                    computed[c, r, op, 0] = now
        for side in range(2):
            for c in range(num_cohorts):
                n = arrived[side, c]
                if sending[side, c] or n == total_moved[c] or (n == 0 and before[c] >= 0 and arrived[side, before[c]] < total_moved[before[c]]):
                    continue
                waves = num_waves[c]
                layer, wave = n // waves, n % waves
                everywhere = True
                for r in range(num_ranks):
                    if ready[side, c, r]:
                        continue
                    is_ready = posted[side, c, r] > n
                    if is_ready and side == DISPATCH:
                        reader = n - num_buffers  # of the buffer, whose experts must have read it
                        if reader >= 0 and done[c, r] <= reader // waves * (1 + waves) + 1 + reader % waves:
                            is_ready = False
                        elif own[c, r, wave] and done[c, r] <= layer * (1 + waves):
                            is_ready = False
                    elif is_ready:
                        is_ready = done[c, r] > layer * (1 + waves) + 1 + wave
                    ready[side, c, r] = is_ready
                    everywhere = everywhere and is_ready
                if everywhere:
                    sending[side, c], changed = True, True
                    rest[side, c] = exchange[c, side, wave, ALONE]
                    load[side, c] = 1000 * exchange[c, side, wave, BUSY] // rest[side, c] if rest[side, c] else 0
                    if keep:
                        moved[c, side, n, 0] = now
        if changed:
            _share_rates(active, demand, speed, weight, rates)
            carried = 0
            for side in range(2):
                for c in range(num_cohorts):
                    carried += load[side, c] if sending[side, c] else 0
            link_speed = min(1000, 1000 * rates.sharing_link_permille // carried) if carried else 1000
            for c in range(num_cohorts):
                for r in range(num_ranks):
                    if active[c, r]:
                        end[c, r] = now + (max(0, left[c, r]) * 1000 + speed[c, r] - 1) // speed[c, r]
                for side in range(2):
                    if sending[side, c]:
                        arrival[side, c] = now + (max(0, rest[side, c]) * 1000 + link_speed - 1) // link_speed
            changed = False
        then = NEVER
        for r in range(num_ranks):
            then = min(then, host_end[r])
            for c in range(num_cohorts):
                then = min(then, end[c, r])
        for c in range(num_cohorts):
            then = min(then, arrival[DISPATCH, c], arrival[COMBINE, c])
        if then == NEVER:
            return finish, exposed
        # Until then everything goes on at its speed.
        passed = then - now
        for r in range(num_ranks):
            computing, communicating = False, False
            for c in range(num_cohorts):
                if active[c, r]:
                    left[c, r] -= passed * speed[c, r] // 1000
                    computing = True
                communicating = communicating or ready[0, c, r] or ready[1, c, r]
            if communicating and not computing:
                exposed[r] += passed
        now = then
        for r in range(num_ranks):
            if host_end[r] == now:
                kind, c = host_kind[r], host_cohort[r]
                if kind == DISPATCH_OP:
                    posted[DISPATCH, c, r] += 1
                elif kind == COMBINE_OP:
                    posted[COMBINE, c, r] += 1
                host_end[r] = NEVER
        for c in range(num_cohorts):
            for r in range(num_ranks):
                if end[c, r] == now:
                    if keep:
                        computed[c, r, done[c, r], 1] = now
                    done[c, r] += 1
                    active[c, r], end[c, r], changed = False, NEVER, True
                    if done[c, r] == total_computed[c]:
                        finish[c, r] = now
            for side in range(2):
                if sending[side, c]:
                    rest[side, c] -= passed * link_speed // 1000
                if arrival[side, c] == now:
                    if keep:
                        moved[c, side, arrived[side, c], 1] = now
                    arrived[side, c] += 1
                    sending[side, c], arrival[side, c], changed = False, NEVER, True
                    for r in range(num_ranks):
                        ready[side, c, r] = False
