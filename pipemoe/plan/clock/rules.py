"""When each operation may begin, and how fast it goes on: the rules of the simulator's clock. Compiled.

They follow pipemoe.runtime.run, which issues the real operations.
"""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.columns import issuing_ns
from pipemoe.plan.clock.layer import ALONE, BUSY, COMBINE, DISPATCH, FINISH, FIRST_ATTEND, LAYER_OF
from pipemoe.plan.compiled import compiled_part, compiled_rule
from pipemoe.plan.schedule import MAX_GROUPS

NEVER = 1 << 60
ATTEND_OP, DISPATCH_OP, EXPERTS_OP, COMBINE_OP, FINISH_OP = 0, 1, 2, 3, 4  # values of OpKind

# The state is a few arrays, not an object: compiled code counts references to every array that it passes on. Layers,
# places and waves are counted along, not divided out: divisions would take most of the time.
# state [., C, R], of C cohorts on R ranks; speeds in thousandths:
LAST_OWN = 0  # last combine, of a layer, of rows of the rank, or -1
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
# of the next computation: its layer; 0 attend or finish, then each wave's experts: head, block by block
WORK_LAYER, WORK_PLACE = 16, 17
# host [., R]: the operation that the rank's engine is issuing
HOST_END, HOST_KIND, HOST_COHORT = 0, 1, 2
# transfers [2, ., C]: of dispatches and of combines
ARRIVED = 0  # complete
SENDING = 1  # one is under way
REST = 2  # ns at full speed that it had left
LOAD = 3  # share of its time in which it contends with others
ARRIVAL = 4  # when it will arrive, or NEVER
LAYER, WAVE = 5, 6  # of the next one; of combines WAVE counts blocks of columns, of all waves
RESTED = 7  # the time of REST
PACE = 8  # its speed
NUM_READY = 9  # ranks that are ready for the next one
# cohorts [6, C]
WAVES = 0
BEFORE = 1  # the cohort that had the slot, or -1
SLOT = 2
BLOCKS = 3  # of columns, in all waves
WORKS = 4  # computations of experts: all blocks, and heads
GROUPS = 5  # of a dispatch


@compiled_part
def layer_template(num_waves):
    """One layer of a cohort, [1 + 3 W, 2] = kind, wave; the dispatch of a wave goes ahead of the experts of the one
    before.
    """
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
    """Is a cohort that is at that place in a layer past its attention of `layer`, or of the one before?"""
    needed = layer if wait == LAYER_OF else layer - 1
    return at_layer > needed or (at_layer == needed and at_place > 0)


@compiled_rule
def issue_next(
    state,
    host,
    transfers,
    cohorts,
    templates,
    waits,
    own,
    issue,
    keys,
    rates,
    num_layers,
    num_blocks,
    num_heads,
    r,
    now,
):
    """Let rank r's engine take the first operation in the plan's order that may be issued, if there is one."""
    best, best_key, best_kind = -1, NEVER, 0
    for c in range(cohorts.shape[1]):
        layer, place = state[r, c, ISSUE_LAYER], state[r, c, ISSUE_PLACE]
        if layer > num_layers or keys[c, state[r, c, ISSUED]] >= best_key:
            continue
        kind = FINISH_OP if layer == num_layers else templates[c, place, 0]
        may = True
        if kind == DISPATCH_OP:
            may = state[r, c, POSTED + DISPATCH] - transfers[DISPATCH, ARRIVED, c] < MAX_GROUPS // cohorts[GROUPS, c]
        elif kind == ATTEND_OP:
            before = cohorts[BEFORE, c]
            if layer == 0 and before >= 0:
                may = state[r, before, ISSUE_LAYER] > num_layers
            for e in range(cohorts.shape[1]):
                if waits[c, e] and not _attended(
                    state[r, e, ISSUE_LAYER], state[r, e, ISSUE_PLACE], layer, waits[c, e]
                ):
                    may = False
        if may:
            best, best_key, best_kind = c, keys[c, state[r, c, ISSUED]], kind
    if best < 0:
        return
    c, kind, wave = best, best_kind, templates[best, state[r, best, ISSUE_PLACE], 1]
    owner = state[r, c, LAST_OWN] >= 0
    if kind == ATTEND_OP:
        takes = issue[c, r]
    elif kind == DISPATCH_OP:
        takes = rates.host_dispatch_ns * cohorts[GROUPS, c] + (rates.host_pack_ns if own[c, r, wave] else 0)
    elif kind == EXPERTS_OP:
        takes = issuing_ns(rates, num_blocks)[0]
    elif kind == COMBINE_OP:
        takes = issuing_ns(rates, num_blocks)[1]
    else:
        takes = rates.host_finish_ns if owner else rates.host_idle_ns
    state[r, c, ISSUED] += 1
    state[r, c, ISSUE_PLACE] += 1
    if kind == FINISH_OP or state[r, c, ISSUE_PLACE] == 1 + 3 * cohorts[WAVES, c]:
        state[r, c, ISSUE_LAYER] += 1
        state[r, c, ISSUE_PLACE] = 0
    host[HOST_END, r], host[HOST_KIND, r], host[HOST_COHORT, r] = now + takes, kind, c
    if kind != DISPATCH_OP and kind != COMBINE_OP:
        state[r, c, QUEUED] += num_heads + num_blocks if kind == EXPERTS_OP else 1


@compiled_rule
def _has_arrived(transfers, side, c, layer, wave):
    now_in = transfers[side, LAYER, c]
    return now_in > layer or (now_in == layer and transfers[side, WAVE, c] > wave)


@compiled_rule
def _earlier(layer, wave, count, waves):
    """Layer and wave `count` waves earlier; the layer is negative where there is none."""
    wave -= count
    while wave < 0:
        wave, layer = wave + waves, layer - 1
    return layer, wave


@compiled_rule
def demand_of(alone, busy, takes, rates):
    """Thousandths of the time that it takes in which an operation contends with others."""
    return (1000 * busy + rates.gap_permille * (alone - busy)) // takes if takes else 0


@compiled_rule
def begin_computation(
    state, host, transfers, cohorts, waits, compute, rates, num_layers, num_buffers, num_blocks, num_heads, c, r, now
):
    """Begin the next computation of cohort c on rank r if it may; returns whether. A head waits for no dispatch, what
    follows it does.
    """
    op, before = state[r, c, DONE], cohorts[BEFORE, c]
    if (
        state[r, c, ACTIVE]
        or state[r, c, QUEUED] <= op
        or (op == 0 and before >= 0 and state[r, before, WORK_LAYER] <= num_layers)
    ):
        return False
    layer, work = state[r, c, WORK_LAYER], state[r, c, WORK_PLACE]
    if work == 0:  # attend or finish
        if (
            layer
            and state[r, c, LAST_OWN] >= 0
            and not _has_arrived(transfers, COMBINE, c, layer - 1, state[r, c, LAST_OWN])
        ):
            return False
        if layer == num_layers:
            work = compute.shape[2] + FINISH
        else:
            for e in range(cohorts.shape[1]):
                if waits[c, e] and not _attended(state[r, e, WORK_LAYER], state[r, e, WORK_PLACE], layer, waits[c, e]):
                    return False
            if layer == 0:
                work = compute.shape[2] + FIRST_ATTEND
    else:
        works = num_heads + num_blocks
        wave, part = (work - 1, 0) if works == 1 else ((work - 1) // works, (work - 1) % works)
        if part == num_heads and not _has_arrived(transfers, DISPATCH, c, layer, wave):
            return False
        if part == 0:
            before_layer, before_wave = _earlier(layer, wave, num_buffers, cohorts[WAVES, c])
            if before_layer >= 0 and not _has_arrived(
                transfers, COMBINE, c, before_layer, (before_wave + 1) * num_blocks - 1
            ):
                return False
    takes = compute[c, r, work, ALONE]
    being_issued = num_heads + num_blocks if host[HOST_KIND, r] == EXPERTS_OP else 1  # the last of those queued
    issuing = host[HOST_END, r] != NEVER and host[HOST_COHORT, r] == c and host[HOST_KIND, r] % 2 == 0
    if issuing and state[r, c, QUEUED] - op <= being_issued:
        takes = max(takes, host[HOST_END, r] - now)
    state[r, c, ACTIVE], state[r, c, LEFT], state[r, c, SINCE] = True, takes, now
    state[r, c, DEMAND] = demand_of(compute[c, r, work, ALONE], compute[c, r, work, BUSY], takes, rates)
    state[r, c, SPEED] = 1000
    return True


@compiled_rule
def share_cores(state, rates, total, r, now):
    """Set the speeds of rank r's computations anew where all ranks compute on the same cores, of which `total` is
    demanded.
    """
    beside = 0
    for c in range(state.shape[1]):
        beside += state[r, c, ACTIVE]
    slowed = 1000 + rates.cores_slowdown_permille * (beside - 1)
    share = max(1, 1000 * rates.cores_permille // total) if total > rates.cores_permille else 1000
    for c in range(state.shape[1]):
        if state[r, c, ACTIVE]:
            _go_on_at(state, max(1, share * 1000 // slowed), c, r, now)


@compiled_rule
def share_device(state, cohorts, speeds, r, now):
    """Set the speeds of rank r's computations anew by the table of contention. A collective takes its thread blocks as
    soon as this rank is ready for it, also while it waits for the others."""
    for c in range(state.shape[1]):
        if not state[r, c, ACTIVE]:
            continue
        kind, speed = min(1, state[r, c, WORK_PLACE]), 1000
        for e in range(state.shape[1]):
            if state[r, e, ACTIVE] and e != c:
                under = 1 if cohorts[SLOT, e] < cohorts[SLOT, c] else 0
                speed = (
                    speed * _beside(speeds[under, kind, min(1, state[r, e, WORK_PLACE])], state[r, e, DEMAND]) // 1000
                )
            for side in range(2):
                if state[r, e, READY + side]:
                    speed = speed * speeds[0, kind, 2 + side] // 1000
        _go_on_at(state, _stretched(speed, state[r, c, DEMAND]), c, r, now)


@compiled_rule
def _beside(speed, demand):
    """Thousandths of full speed beside something busy for `demand` thousandths of the time."""
    return 1000 - demand * (1000 - speed) // 1000


@compiled_rule
def _stretched(speed, demand):
    """The speed of all of an operation of which `demand` thousandths go on at `speed`, the rest at full speed."""
    return max(1, 1_000_000 // (1000 - demand + demand * 1000 // max(1, speed)))


@compiled_rule
def _go_on_at(state, speed, c, r, now):
    state[r, c, LEFT] = max(0, state[r, c, LEFT] - (now - state[r, c, SINCE]) * state[r, c, SPEED] // 1000)
    state[r, c, SINCE], state[r, c, SPEED] = now, speed
    state[r, c, END] = now + (state[r, c, LEFT] * 1000 + speed - 1) // speed


@compiled_rule
def slow_links(state, beside, speeds, r):
    """How fast the computation on rank r lets transfers go on: beside[side, r]."""
    for side in range(2):
        speed = 1000
        for e in range(state.shape[1]):
            if state[r, e, ACTIVE]:
                speed = (
                    speed * _beside(speeds[0, 2 + side, min(1, state[r, e, WORK_PLACE])], state[r, e, DEMAND]) // 1000
                )
        beside[side, r] = speed


@compiled_rule
def share_links(transfers, beside, speeds, now):
    """Set the speeds of all transfers anew: each as on the rank that slows it most."""
    num_cohorts = transfers.shape[2]
    for side in range(2):
        slowest = 0  # not yet known
        for c in range(num_cohorts):
            if not transfers[side, SENDING, c]:
                continue
            if not slowest:
                slowest = 1000
                for r in range(beside.shape[1]):
                    slowest = min(slowest, beside[side, r])
            speed = slowest
            for other in range(2):
                for e in range(num_cohorts):
                    if transfers[other, SENDING, e] and (other != side or e != c):
                        speed = speed * _beside(speeds[0, 2 + side, 2 + other], transfers[other, LOAD, e]) // 1000
            speed = _stretched(speed, transfers[side, LOAD, c])
            if speed != transfers[side, PACE, c]:
                passed = (now - transfers[side, RESTED, c]) * transfers[side, PACE, c] // 1000
                transfers[side, REST, c] = max(0, transfers[side, REST, c] - passed)
                transfers[side, RESTED, c], transfers[side, PACE, c] = now, speed
                transfers[side, ARRIVAL, c] = now + (transfers[side, REST, c] * 1000 + speed - 1) // speed


@compiled_rule
def is_ready(state, transfers, cohorts, own, num_buffers, num_blocks, num_heads, side, c, r):
    """Has rank r what its part of cohort c's next transfer needs?"""
    if state[r, c, POSTED + side] <= transfers[side, ARRIVED, c]:
        return False
    layer, wave = transfers[side, LAYER, c], transfers[side, WAVE, c]
    work_layer, work_place = state[r, c, WORK_LAYER], state[r, c, WORK_PLACE]
    if side == COMBINE:
        work = 1 + wave + (num_heads * (1 + wave // num_blocks) if num_heads else 0)
        return work_layer > layer or (work_layer == layer and work_place > work)
    if own[c, r, wave] and (work_layer < layer or (work_layer == layer and work_place == 0)):
        return False
    layer, wave = _earlier(layer, wave, num_buffers, cohorts[WAVES, c])  # of the buffer's reader before
    return (
        layer < 0 or work_layer > layer or (work_layer == layer and work_place > (1 + wave) * (num_heads + num_blocks))
    )
