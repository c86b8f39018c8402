"""The compiled loop that plays a step's tapes on a rank without peers, where each slot has one lane: what Run decides
and enqueues, over arrays of numbers, without the GIL.

    lane    | ... done ... | head: oldest under way | ... | tail: next |      numbers of events, from 0 on

A lane's operations have numbers, and its events a ring of CUDA events; number n uses place n % RING. A reference is a
lane and a number in one integer. What lies before the head is done and need not be waited for.

The loop stops where only Python can go on (an operation without a tape), where nothing may be issued and nothing has
completed for SPIN_NS, and after BREATH_NS at the latest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipemoe.compiled import Compiled
from pipemoe.plan.schedule import MAX_GROUPS
from pipemoe.plan.waits import LAYER_BEFORE, LAYER_OF
from pipemoe.runtime.native_calls import (
    address_of,
    call_1,
    call_2,
    call_3,
    call_row_2,
    call_row_4,
    store,
)
from pipemoe_kernels.launch.tape import NUMBER, WORD

RING = 256  # operations of a lane under way at once, at most
_SHIFT, _MASK = 40, (1 << 40) - 1  # of a reference: lane << _SHIFT | number
NOTHING = -1  # no reference, or no rows

# Why the loop has stopped.
WAITS, FOR_PYTHON, BREATH, FAILED = range(4)
BREATH_NS, SPIN_NS = 1_000_000, 200_000  # a thread that sleeps instead wakes some 70 us late
_CLOCK_MONOTONIC = 1

# Columns of State.cohorts.
AT, SLOT, NUM_WAVES, FIRST_WAVE, GROUPS, ATTENDED, IS_FINISHED = range(7)
COHORT_COLUMNS = 7
# Of State.lanes.
STREAM, HEAD, TAIL = range(3)
# Of State.wave_pieces.
PACK, COMBINE = range(2)
# Of State.out.
CURRENT, STATUS, ROW_AT, NUM_DONE, OLDEST, ISSUE_NS, HAS_FINISHED = range(7)
# Of State.functions: addresses.
QUERY, RECORD, WAIT, CLOCK = range(4)
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_ATTEND, _DISPATCH, _EXPERTS, _COMBINE, _FINISH = range(5)  # OpKind


def loop_part(function: Callable) -> Compiled:
    return Compiled(function, inside=True, error_model="numpy")


def loop(function: Callable) -> Compiled:
    return Compiled(function, what="the loop of tapes", seconds=10, error_model="numpy", nogil=True)


class State(NamedTuple):
    """A run's arrays; int64 but for `order`. A piece is a range of a tape's rows, [start, stop); start is NOTHING where
    Python has to do the operation.
    """

    order: np.ndarray  # int32 [ops, 4], of the plan
    turn: np.ndarray  # [ops] the operations' positions, cohort by cohort
    begin: np.ndarray  # [C + 1] where each cohort's begin in `turn`
    waits: np.ndarray  # [C, C] see Plan.waits
    cohorts: np.ndarray  # [C, COHORT_COLUMNS]
    attended: np.ndarray  # [C, L] references
    finished: np.ndarray  # [C] references
    lanes: np.ndarray  # [lanes, 3]
    ring: np.ndarray  # [lanes, RING] events under way
    own: np.ndarray  # [lanes, RING] events to record
    ops: np.ndarray  # [lanes, RING] positions; -1: no operation of the plan
    attend_pieces: np.ndarray  # [C, L, 2]
    side_pieces: np.ndarray  # [C, L, 2]
    wave_pieces: np.ndarray  # [W, buffers, 2, 2], W counts the waves of all cohorts
    expert_pieces: np.ndarray  # [W, L, 3], and the kind of numbers
    numbers: np.ndarray  # [W, buffers, kinds, n] of the experts' pieces
    functions: np.ndarray  # [4]
    done: np.ndarray  # [ops] positions that have completed in this call
    time: np.ndarray  # [2] seconds and nanoseconds of the clock
    out: np.ndarray  # [7]


def new_state(order: np.ndarray, waits: np.ndarray, **sizes: int) -> State:
    """A state at the beginning, without pieces. sizes: layers, waves, buffers, lanes, kinds, numbers."""
    num_ops, num_cohorts = len(order), len(waits)
    layers, waves, buffers, lanes = (sizes[k] for k in ("layers", "waves", "buffers", "lanes"))

    def filled(*shape: int, value: int = NOTHING) -> np.ndarray:
        return np.full(shape, value, np.int64)

    begin = np.zeros(num_cohorts + 1, np.int64)
    np.cumsum(np.bincount(order[:, 1], minlength=num_cohorts), out=begin[1:])
    return State(
        order=np.ascontiguousarray(order, np.int32),
        turn=np.argsort(order[:, 1], kind="stable").astype(np.int64),
        begin=begin,
        waits=np.ascontiguousarray(waits, np.int64),
        cohorts=filled(num_cohorts, COHORT_COLUMNS, value=0),
        attended=filled(num_cohorts, layers),
        finished=filled(num_cohorts),
        lanes=filled(lanes, 3, value=0),
        ring=filled(lanes, RING, value=0),
        own=filled(lanes, RING, value=0),
        ops=filled(lanes, RING),
        attend_pieces=filled(num_cohorts, layers, 2),
        side_pieces=filled(num_cohorts, layers, 2, value=0),
        wave_pieces=filled(waves, buffers, 2, 2),
        expert_pieces=filled(waves, layers, 3),
        numbers=filled(waves, buffers, sizes["kinds"], sizes["numbers"], value=0),
        functions=filled(4, value=0),
        done=filled(num_ops),
        time=filled(2, value=0),
        out=filled(7, value=0),
    )


def reference(lane: int, number: int) -> int:
    return lane << _SHIFT | number


def parts_of_reference(ref: int) -> tuple[int, int]:
    """Lane and number."""
    return ref >> _SHIFT, ref & _MASK


@loop_part
def play_rows(rows, start, stop, numbers):
    """The row at which it stopped and the status there; -1 and 0 at the end."""
    for at in range(start, stop):
        kind = rows[at, 0]
        status = 0
        if kind == WORD:
            store(rows[at, 1], rows[at, 2])
        elif kind == NUMBER:
            store(rows[at, 1], numbers[rows[at, 2]])
        elif kind == 4:
            status = call_row_4(rows[at, 1], rows, at)
        else:
            status = call_row_2(rows[at, 1], rows, at)
        if status != 0:
            return at, status
    return -1, 0


@loop_part
def wait_for(state, ref, lane):
    """Let a lane wait for what a reference names, unless it is done or comes before in the same lane; a status."""
    other, number = ref >> _SHIFT, ref & _MASK
    if ref < 0 or other == lane or number < state.lanes[other, HEAD]:
        return 0
    event = state.ring[other, number % RING]
    return call_3(state.functions[WAIT], state.lanes[lane, STREAM], event, 0)


@loop_part
def record(state, lane, position):
    """Mark a point in a lane: the reference, and a status."""
    number = state.lanes[lane, TAIL]
    place = number % RING
    event = state.own[lane, place]
    state.ring[lane, place], state.ops[lane, place] = event, position
    state.lanes[lane, TAIL] = number + 1
    return lane << _SHIFT | number, call_2(state.functions[RECORD], event, state.lanes[lane, STREAM])


@loop_part
def poll(state):
    """Move the lanes' heads; note operations that have completed. A status."""
    for lane in range(len(state.lanes)):
        while state.lanes[lane, HEAD] < state.lanes[lane, TAIL]:
            place = state.lanes[lane, HEAD] % RING
            status = call_1(state.functions[QUERY], state.ring[lane, place])
            if status == _NOT_READY:
                break
            if status != 0:
                state.out[CURRENT] = max(0, state.ops[lane, place])
                return status
            note_done(state, state.ops[lane, place])
            state.lanes[lane, HEAD] += 1
    return 0


@loop_part
def note_done(state, position):
    if position < 0:
        return
    state.done[state.out[NUM_DONE]] = position
    state.out[NUM_DONE] += 1
    if state.order[position, 0] == _DISPATCH:
        state.cohorts[state.order[position, 1], GROUPS] -= 1
    elif state.order[position, 0] == _FINISH:
        state.out[HAS_FINISHED] = 1  # somebody waits for it


@loop_part
def has_room(state, lane):
    """May an operation be added?"""
    return state.lanes[lane, TAIL] - state.lanes[lane, HEAD] <= RING - 4


@loop_part
def may_issue(state, position):
    kind, c, layer = state.order[position, 0], state.order[position, 1], state.order[position, 2]
    slot = state.cohorts[c, SLOT]
    if not has_room(state, slot):
        return False
    if kind == _DISPATCH:
        return state.cohorts[c, GROUPS] < MAX_GROUPS
    if kind == _FINISH:
        for e in range(len(state.waits)):
            if state.waits[c, e] == LAYER_OF and not state.cohorts[e, IS_FINISHED]:
                return False
        return True
    if kind != _ATTEND:
        return True
    if layer == 0:
        for e in range(c):
            if state.cohorts[e, SLOT] == slot and state.cohorts[e, AT] < state.begin[e + 1]:
                return False
    for e in range(len(state.waits)):
        if state.waits[c, e] == LAYER_OF and state.cohorts[e, ATTENDED] <= layer:
            return False
        if state.waits[c, e] == LAYER_BEFORE and state.cohorts[e, ATTENDED] < layer:
            return False
    return True


@loop_part
def next_position(state):
    """The first operation in the plan's order that may be issued, or -1."""
    best = -1
    for c in range(len(state.cohorts)):
        at = state.cohorts[c, AT]
        if at < state.begin[c + 1]:
            position = state.turn[at]
            if (best < 0 or position < best) and may_issue(state, position):
                best = position
    return best


@loop_part
def piece_of(state, position):
    """Start and stop of an operation's own rows, and the kind of the experts' numbers."""
    kind, c, layer, wave = state.order[position]
    if kind == _ATTEND:
        return state.attend_pieces[c, layer, 0], state.attend_pieces[c, layer, 1], 0
    if kind == _FINISH:
        return NOTHING, NOTHING, 0
    w = state.cohorts[c, FIRST_WAVE] + wave
    if kind == _EXPERTS:
        return state.expert_pieces[w, layer, 0], state.expert_pieces[w, layer, 1], state.expert_pieces[w, layer, 2]
    b = buffer_of(state, c, layer, wave)
    of_op = state.wave_pieces[w, b, PACK if kind == _DISPATCH else COMBINE]
    return of_op[0], of_op[1], 0


@loop_part
def buffer_of(state, c, layer, wave):
    return (layer * state.cohorts[c, NUM_WAVES] + wave) % state.numbers.shape[1]


@loop_part
def issue(state, rows, position, start, stop, numbers_kind):
    """Enqueue an operation that has a tape; the row at which a call failed, and its status."""
    kind, c, layer, wave = state.order[position]
    lane = state.cohorts[c, SLOT]
    w, b = state.cohorts[c, FIRST_WAVE] + wave, buffer_of(state, c, layer, wave)
    numbers = state.numbers[w, b, numbers_kind]
    if kind == _ATTEND:
        for e in range(len(state.waits)):
            status = 0
            if state.waits[c, e] == LAYER_OF:
                status = wait_for(state, state.attended[e, layer], lane)
            elif state.waits[c, e] == LAYER_BEFORE and layer > 0:
                status = wait_for(state, state.attended[e, layer - 1], lane)
            if status != 0:
                return -1, status
    at, status = play_rows(rows, start, stop, numbers)
    if status != 0:
        return at, status
    ref, status = record(state, lane, position)
    if kind == _ATTEND:
        state.attended[c, layer], state.cohorts[c, ATTENDED] = ref, layer + 1
    elif kind == _DISPATCH:
        state.cohorts[c, GROUPS] += 1
        if status == 0 and wave == 0:
            return play_rows(rows, state.side_pieces[c, layer, 0], state.side_pieces[c, layer, 1], numbers)
    return -1, status


@loop_part
def oldest(state):
    """The first operation in the plan's order that is under way, or -1."""
    first = -1
    for lane in range(len(state.lanes)):
        for number in range(state.lanes[lane, HEAD], state.lanes[lane, TAIL]):
            position = state.ops[lane, number % RING]
            if position >= 0 and (first < 0 or position < first):
                first = position
    return first


@loop_part
def is_idle(state):
    for lane in range(len(state.lanes)):
        if state.lanes[lane, HEAD] < state.lanes[lane, TAIL]:
            return False
    return True


@loop_part
def nanoseconds(state):
    call_2(state.functions[CLOCK], _CLOCK_MONOTONIC, address_of(state.time))
    return state.time[0] * 1_000_000_000 + state.time[1]


@loop
def play(state, rows, budget_ns, spin_ns):
    """Issue what may be issued and has a tape. Why it has stopped; see `out` and `done`.

    out[ISSUE_NS]: what issuing has taken, without waiting.
    """
    out = state.out
    out[NUM_DONE] = out[ISSUE_NS] = out[HAS_FINISHED] = 0
    out[ROW_AT], out[STATUS] = -1, 0
    reason, now = WAITS, nanoseconds(state)
    begun = moved = now  # since nothing has
    while True:
        position = next_position(state)
        if position < 0:
            before = out[NUM_DONE]
            out[STATUS] = poll(state)
            if out[STATUS] != 0:
                reason = FAILED
                break
            now = nanoseconds(state)
            if out[NUM_DONE] > before:
                moved = now
            elif now - moved >= spin_ns or is_idle(state):
                break
        else:
            out[CURRENT] = position
            start, stop, numbers_kind = piece_of(state, position)
            if start < 0:
                reason = FOR_PYTHON
                break
            out[ROW_AT], out[STATUS] = issue(state, rows, position, start, stop, numbers_kind)
            if out[STATUS] != 0:
                reason = FAILED
                break
            state.cohorts[state.order[position, 1], AT] += 1
            before_ns, now = now, nanoseconds(state)
            out[ISSUE_NS] += now - before_ns
            moved = now
        if now - begun > budget_ns or out[HAS_FINISHED]:
            reason = BREATH
            break
    out[OLDEST] = oldest(state)
    return reason
