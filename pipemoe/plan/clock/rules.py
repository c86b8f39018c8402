"""When each operation may begin, and how fast it runs: the rules of the clock. Compiled.

They follow pipemoe.runtime.run, which issues the real operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH, FINISH, FIRST_ATTEND
from pipemoe.plan.compiled import compiled_part, compiled_rule
from pipemoe.plan.cost.tuned import LEAST_SHARE
from pipemoe.plan.schedule import MAX_GROUPS
from pipemoe.plan.waits import LAYER_OF

NEVER = 1 << 60
ATTEND_OP, DISPATCH_OP, EXPERTS_OP, COMBINE_OP, FINISH_OP = 0, 1, 2, 3, 4  # values of OpKind

# The clock's state is record arrays, and whatever grows is counted along: divisions would take most of the time.
# Speeds and shares are in thousandths.
COHORT = np.dtype(  # [C]
    [
        ("waves", "i8"),
        ("before", "i8"),  # the cohort that had the slot, or -1
        ("slot", "i8"),
    ]
)
STATE = np.dtype(  # [R, C]: a cohort on a rank
    [
        ("last_own", "i8"),  # last combine, of a layer, of rows of the rank, or -1
        ("issued", "i8"),  # operations
        ("issue_layer", "i8"),  # of the next operation to issue: its layer,
        ("issue_place", "i8"),  # and its place in layer_template
        ("posted", "i8", (2,)),  # dispatches and combines issued
        ("ready", "i8", (2,)),  # does the rank have all that its part of the next dispatch, or combine, needs?
        ("queued", "i8"),  # computations issued
        ("done", "i8"),  # computations
        ("work_layer", "i8"),  # of the next computation: its layer,
        ("work_place", "i8"),  # and 0 attend or finish, then each wave's experts
        ("active", "i8"),  # is a computation under way?
        ("left", "i8"),  # ns at full speed that it had left
        ("since", "i8"),  # at this time
        ("demand", "i8"),  # share of the device that it takes by itself
        ("speed", "i8"),
        ("end", "i8"),  # when it will end at that speed, or NEVER
    ]
)
HOST = np.dtype([("end", "i8"), ("kind", "i8"), ("cohort", "i8")])  # [R]: what the rank's conductor is issuing
TRANSFER = np.dtype(  # [2, C]: dispatches and combines
    [
        ("arrived", "i8"),  # complete
        ("layer", "i8"),  # of the next one,
        ("wave", "i8"),  # and its wave
        ("num_ready", "i8"),  # ranks that are ready for it
        ("sending", "i8"),  # is it under way?
        ("rest", "i8"),  # ns at full speed that it had left
        ("rested", "i8"),  # at this time
        ("load", "i8"),  # share of its time in which it contends with others
        ("pace", "i8"),  # its speed
        ("arrival", "i8"),  # when it will arrive, or NEVER
    ]
)


class Clock(NamedTuple):
    """What changes while the clock runs, and what it runs by."""

    state: Any  # STATE [R, C]
    host: Any  # HOST [R]
    transfers: Any  # TRANSFER [2, C]
    cohorts: Any  # COHORT [C]
    templates: Any  # [C, 1 + 3 W, 2]: of layer_template
    keys: Any  # [C, >= n]: where a cohort's n-th operation stands in the plan's order
    num_layers: Any
    num_buffers: Any


@compiled_part
def layer_template(num_waves):
    """One layer of a cohort, [1 + 3 W, 2] = kind, wave. A wave is dispatched before the experts of the wave before."""
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


@compiled_rule
def _attended(at_layer, at_place, layer, wait):
    """Is a cohort that is at `at_place` of `at_layer` past the attention that is waited for?"""
    needed = layer if wait == LAYER_OF else layer - 1
    return at_layer > needed or (at_layer == needed and at_place > 0)


@compiled_rule
def issue_next(clock, costs, rates, r, now):
    """Let rank r's conductor take the first operation in the plan's order that may be issued now, if there is one."""
    state, host, transfers, cohorts = clock.state, clock.host, clock.transfers, clock.cohorts
    keys, templates, num_layers, waits = clock.keys, clock.templates, clock.num_layers, costs.waits
    best, best_key, best_kind = -1, NEVER, 0
    for c in range(len(cohorts)):
        layer, place = state[r, c].issue_layer, state[r, c].issue_place
        if layer > num_layers or keys[c, state[r, c].issued] >= best_key:
            continue
        kind = FINISH_OP if layer == num_layers else templates[c, place, 0]
        may = True
        if kind == DISPATCH_OP:
            may = state[r, c].posted[DISPATCH] - transfers[DISPATCH, c].arrived < MAX_GROUPS
        elif kind == ATTEND_OP:
            before = cohorts[c].before
            if layer == 0 and before >= 0:
                may = state[r, before].issue_layer > num_layers
            for e in range(len(cohorts)):
                if waits[c, e] and not _attended(state[r, e].issue_layer, state[r, e].issue_place, layer, waits[c, e]):
                    may = False
        if may:
            best, best_key, best_kind = c, keys[c, state[r, c].issued], kind
    if best < 0:
        return
    c, kind, wave = best, best_kind, templates[best, state[r, best].issue_place, 1]
    mine = state[r, c]
    if kind == ATTEND_OP:
        takes = costs.issue[c, r]
    elif kind == DISPATCH_OP:
        takes = rates.host_dispatch_ns + (rates.host_pack_ns if costs.own[c, r, wave] else 0)
    elif kind == EXPERTS_OP:
        takes = rates.host_experts_ns
    elif kind == COMBINE_OP:
        takes = rates.host_combine_ns
    else:
        takes = rates.host_finish_ns if mine.last_own >= 0 else rates.host_idle_ns
    mine.issued += 1
    mine.issue_place += 1
    if kind == FINISH_OP or mine.issue_place == 1 + 3 * cohorts[c].waves:
        mine.issue_layer += 1
        mine.issue_place = 0
    host[r].end, host[r].kind, host[r].cohort = now + takes, kind, c
    if kind != DISPATCH_OP and kind != COMBINE_OP:
        mine.queued += 1


@compiled_rule
def _has_arrived(transfers, side, c, layer, wave):
    now_in = transfers[side, c].layer
    return now_in > layer or (now_in == layer and transfers[side, c].wave > wave)


@compiled_rule
def _earlier(layer, wave, count, waves):
    """Layer and wave `count` waves earlier; the layer is negative where there is none."""
    wave -= count
    while wave < 0:
        wave, layer = wave + waves, layer - 1
    return layer, wave


@compiled_rule
def demand_of(alone, busy, takes, rates):
    """The share of its time in which an operation contends with others, in thousandths."""
    return (1000 * busy + rates.gap_permille * (alone - busy)) // takes if takes else 0


@compiled_rule
def begin_computation(clock, costs, rates, c, r, now):
    """Begin the next computation of cohort c on rank r, if it may; returns whether it did."""
    state, host, transfers, cohorts = clock.state, clock.host, clock.transfers, clock.cohorts
    compute, num_layers = costs.compute, clock.num_layers
    mine = state[r, c]
    op, before = mine.done, cohorts[c].before
    if mine.active or mine.queued <= op or (op == 0 and before >= 0 and state[r, before].work_layer <= num_layers):
        return False
    layer, work = mine.work_layer, mine.work_place
    if work == 0:  # attend or finish
        if layer and mine.last_own >= 0 and not _has_arrived(transfers, COMBINE, c, layer - 1, mine.last_own):
            return False
        if layer == num_layers:
            work = compute.shape[2] + FINISH
        else:
            for e in range(len(cohorts)):
                wait = costs.waits[c, e]
                if wait and not _attended(state[r, e].work_layer, state[r, e].work_place, layer, wait):
                    return False
            if layer == 0:
                work = compute.shape[2] + FIRST_ATTEND
    else:
        wave = work - 1
        if not _has_arrived(transfers, DISPATCH, c, layer, wave):
            return False
        before_layer, before_wave = _earlier(layer, wave, clock.num_buffers, cohorts[c].waves)
        if before_layer >= 0 and not _has_arrived(transfers, COMBINE, c, before_layer, before_wave):
            return False
    takes = compute[c, r, work, ALONE]
    issuing = host[r].end != NEVER and host[r].cohort == c and host[r].kind % 2 == 0
    if issuing and mine.queued - op <= 1:
        takes = max(takes, host[r].end - now)
    mine.active, mine.left, mine.since = True, takes, now
    mine.demand = demand_of(compute[c, r, work, ALONE], compute[c, r, work, BUSY], takes, rates)
    mine.speed = 1000
    return True


@compiled_rule
def core_shares(state, cohorts, weight, rates, shares):
    """Set shares [S]: how fast each slot's computations run, in thousandths, if all ranks compute on the same cores.
    Earlier slots go first; what they leave, and LEAST_SHARE at least, is for the later ones.
    """
    shares[:] = 0  # at first, their demand
    for r in range(state.shape[0]):
        for c in range(state.shape[1]):
            if state[r, c].active:
                shares[cohorts[c].slot] += weight[r] * state[r, c].demand
    left = rates.cores_permille
    for slot in range(len(shares)):
        demand = shares[slot]
        allowed = max(left, rates.cores_permille * LEAST_SHARE // 1000)
        shares[slot] = max(1, 1000 * allowed // demand) if demand > allowed else 1000
        left -= min(left, demand)


@compiled_rule
def share_cores(state, cohorts, rates, shares, r, now):
    """Set the speeds of rank r's computations anew, by the shares of core_shares."""
    beside = 0
    for c in range(state.shape[1]):
        beside += state[r, c].active
    slowed = 1000 + rates.cores_slowdown_permille * (beside - 1)
    for c in range(state.shape[1]):
        if state[r, c].active:
            _go_on_at(state[r, c], max(1, shares[cohorts[c].slot] * 1000 // slowed), now)


@compiled_rule
def share_device(state, cohorts, speeds, r, now):
    """Set the speeds of rank r's computations anew by the table of contention. A collective takes its thread blocks as
    soon as this rank is ready for it, even while it waits for other ranks.
    """
    for c in range(state.shape[1]):
        if not state[r, c].active:
            continue
        kind, speed = min(1, state[r, c].work_place), 1000
        for e in range(state.shape[1]):
            if state[r, e].active and e != c:
                under = 1 if cohorts[e].slot < cohorts[c].slot else 0
                speed = speed * _beside(speeds[under, kind, min(1, state[r, e].work_place)], state[r, e].demand) // 1000
            for side in range(2):
                if state[r, e].ready[side]:
                    speed = speed * speeds[0, kind, 2 + side] // 1000
        _go_on_at(state[r, c], _stretched(speed, state[r, c].demand), now)


@compiled_rule
def _beside(speed, demand):
    """The speed beside something that is busy for `demand` thousandths of the time."""
    return 1000 - demand * (1000 - speed) // 1000


@compiled_rule
def _stretched(speed, demand):
    """The overall speed, if `demand` thousandths of an operation run at `speed` and the rest at full speed."""
    return max(1, 1_000_000 // (1000 - demand + demand * 1000 // max(1, speed)))


@compiled_rule
def _go_on_at(mine, speed, now):
    """Let a computation run at another speed from now on."""
    mine.left = max(0, mine.left - (now - mine.since) * mine.speed // 1000)
    mine.since, mine.speed = now, speed
    mine.end = now + (mine.left * 1000 + speed - 1) // speed


@compiled_rule
def slow_links(state, beside, speeds, r):
    """Set beside[side, r]: how fast transfers run beside the computation on rank r."""
    for side in range(2):
        speed = 1000
        for e in range(state.shape[1]):
            if state[r, e].active:
                speed = speed * _beside(speeds[0, 2 + side, min(1, state[r, e].work_place)], state[r, e].demand) // 1000
        beside[side, r] = speed


@compiled_rule
def share_links(transfers, beside, speeds, now):
    """Set the speeds of all transfers anew. The rank that slows a transfer most decides."""
    num_cohorts = transfers.shape[1]
    for side in range(2):
        slowest = 0  # not yet known
        for c in range(num_cohorts):
            transfer = transfers[side, c]
            if not transfer.sending:
                continue
            if not slowest:
                slowest = 1000
                for r in range(beside.shape[1]):
                    slowest = min(slowest, beside[side, r])
            speed = slowest
            for other in range(2):
                for e in range(num_cohorts):
                    if transfers[other, e].sending and (other != side or e != c):
                        speed = speed * _beside(speeds[0, 2 + side, 2 + other], transfers[other, e].load) // 1000
            speed = _stretched(speed, transfer.load)
            if speed != transfer.pace:
                passed = (now - transfer.rested) * transfer.pace // 1000
                transfer.rest = max(0, transfer.rest - passed)
                transfer.rested, transfer.pace = now, speed
                transfer.arrival = now + (transfer.rest * 1000 + speed - 1) // speed


@compiled_rule
def is_ready(clock, costs, side, c, r):
    """Does rank r have all that its part of cohort c's next transfer needs?"""
    mine, transfer = clock.state[r, c], clock.transfers[side, c]
    if mine.posted[side] <= transfer.arrived:
        return False
    layer, wave = transfer.layer, transfer.wave
    work_layer, work_place = mine.work_layer, mine.work_place
    if side == COMBINE:
        return work_layer > layer or (work_layer == layer and work_place > 1 + wave)
    if costs.own[c, r, wave] and (work_layer < layer or (work_layer == layer and work_place == 0)):
        return False
    layer, wave = _earlier(layer, wave, clock.num_buffers, clock.cohorts[c].waves)  # of the buffer's reader before
    return layer < 0 or work_layer > layer or (work_layer == layer and work_place > 1 + wave)
