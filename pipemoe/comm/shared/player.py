"""The compiled loop that does a slot's work from records, without the GIL: what a slot's thread does of pieces of work
in Python (pipemoe.runtime.host_lanes), in the same order and under the same waits.

A slot has two queues of records, of sums and of computations. A record waits, calls one or two functions, and raises a
flag. The first of a queue goes first; sums go before computations, as a sum completes a layer:

    sums                                     add, flag
    computations   attend   write rows, flag   experts, flag   attend ...

A wait is a word at an address and the number that it must have come to: a flag of a rank, or how many records a queue
of this rank has done. So all waits look alike, and compiled code sees them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numba import types

from pipemoe.addresses import call_at
from pipemoe.comm.shared import bells as of_bells
from pipemoe.comm.shared import words
from pipemoe.comm.shared.words import _load, _store, compiled, compiled_part

SUMS, COMPUTATIONS = range(2)

if TYPE_CHECKING:
    from pipemoe.comm.shared.bells import Bells

# Columns of a record. CALL, THEN: addresses of functions, each with that of its arguments behind it; 0: none. WAIT,
# LAST_WAIT: rows of the waits. FLAG, NUMBER: the address of the word that is raised, or 0, and to what. RINGS,
# EXPECTING, LAST_RING: of the bells that ring then, those that expect it from RINGS on, others from EXPECTING on. OP:
# the operation's position in the plan.
CALL, CALL_OF, THEN, THEN_OF, WAIT, LAST_WAIT, FLAG, NUMBER, RINGS, EXPECTING, LAST_RING, OP = range(12)
FOR_PYTHON = 1  # as CALL: the loop stops here
# Columns of a wait, and its kinds: for a queue of the own slot, of another slot, for a flag, and for a flag that its
# rank raises for nobody in particular.
ADDRESS, COME_TO, KIND = range(3)
OWN, OTHER_SLOT, A_FLAG, OF_REUSE = range(4)
# How a loop is set.
BELL, CHANNEL, WORDS, SPIN_NS, NUM_CORES, IS_THREAD, IS_TIMED = range(7)
WAITS_HERE = 8  # bytes behind WORDS, after a word for each queue: how many of its records are done
# Why the loop has stopped.
STOPPED, IS_OVER, BREATH = range(3)

_RECORDS, _NUMBERS = types.int64[:, ::1], types.int64[::1]


@compiled_part
def _has_come(waits, i):
    address = waits[i, ADDRESS]
    return address == 0 or np.int32(_load(address) - np.int32(waits[i, COME_TO])) >= 0


@compiled_part
def _is_free(records, at, waits):
    """Have all waits of a record come? Those that have are not looked at again."""
    while records[at, WAIT] < records[at, LAST_WAIT]:
        if not _has_come(waits, records[at, WAIT]):
            return False
        records[at, WAIT] += 1
    return True


@compiled(lambda: types.void(_RECORDS, types.int64, types.int64, _NUMBERS, _NUMBERS, _RECORDS))
def tell_done(records, at, queue, setting, bells, others):
    """A record's work is done: raise its flag, ring, and wake up slots of this rank that wait for it.

    bells: addresses, see RINGS. others [n, 2]: of other slots the address of the word that says that they wait for this
    rank, and their channel.
    """
    channel = setting[CHANNEL]
    if records[at, FLAG]:
        _store(records[at, FLAG], np.int32(records[at, NUMBER]))
    _store(setting[WORDS] + 4 * queue, np.int32(at + 1))
    if records[at, RINGS] < records[at, EXPECTING]:
        of_bells._ring(bells[records[at, RINGS] : records[at, EXPECTING]], channel, 1)
    if records[at, EXPECTING] < records[at, LAST_RING]:
        of_bells._ring(bells[records[at, EXPECTING] : records[at, LAST_RING]], channel, 0)
    for i in range(len(others)):
        if _load(others[i, 0]):
            of_bells._ring_at_once(setting[BELL], others[i, 1])


@compiled_part
def _lacks(records, at, waits, setting, channels_wanted):
    """Say for which rings a record waits. False if it waits for nothing any more."""
    missing, every, is_free = 0, 0, True
    for i in range(records[at, WAIT], records[at, LAST_WAIT]):
        if _has_come(waits, i):
            continue
        kind = waits[i, KIND]
        if kind == OTHER_SLOT:
            _store(setting[WORDS] + WAITS_HERE, np.int32(1))
            if _has_come(waits, i):  # just before the other slot could see that
                continue
        is_free = False
        if kind == A_FLAG:
            missing += 1
        elif kind == OF_REUSE:
            every = 1
    if missing or every:
        most = 1 if every else missing
        wanted = channels_wanted[0]
        channels_wanted[0] = most if wanted == 0 else min(wanted, most)
    channels_wanted[1] |= every
    return not is_free


@compiled_part
def _do(records, at, setting, spans):
    op = records[at, OP]
    if setting[IS_TIMED]:
        spans[op, 0] = words.now_ns()
    if records[at, CALL]:
        call_at(records[at, CALL], records[at, CALL_OF])
    if records[at, THEN]:
        call_at(records[at, THEN], records[at, THEN_OF])
    if setting[IS_TIMED]:
        spans[op, 1] = words.now_ns()


@compiled(
    lambda: types.int64(
        _RECORDS, _RECORDS, _RECORDS, _NUMBERS, _NUMBERS, _RECORDS, _NUMBERS, _RECORDS, _NUMBERS, types.int64
    )
)
def play(sums, computations, waits, setting, bells, others, all_bells, spans, out, breath_ns):
    """Do what may be done, and sleep while nothing may, for about breath_ns. spans [operations, 2]: begin and end of
    each, if timed. out[0]: the queue at whose record for Python it has STOPPED.
    """
    bell, channel, is_thread = setting[BELL], setting[CHANNEL], setting[IS_THREAD] != 0
    channels, seen, wanted = np.empty(1, np.int64), np.empty(2, np.int64), np.empty(2, np.int64)
    channels[0] = channel
    every_at = bell + of_bells._LINE * (1 + channel) + of_bells._EVERY
    works_at = bell + of_bells._LINE * (1 + channel) + of_bells._WORKS
    begin = words.now_ns()
    while True:
        of_bells._look(bell, channels, seen)
        if is_thread:
            of_bells._give_way(all_bells, channel, setting[NUM_CORES])
            _store(works_at, np.int32(1))
        num_left, did = 0, False
        for queue in range(2):
            records = sums if queue == SUMS else computations
            at = np.int64(_load(setting[WORDS] + 4 * queue))
            if at >= len(records):
                continue
            num_left += 1
            if not _is_free(records, at, waits):
                continue
            if records[at, CALL] == FOR_PYTHON:
                out[0] = queue
                return STOPPED
            _do(records, at, setting, spans)
            tell_done(records, at, queue, setting, bells, others)
            did = True
            break
        now = words.now_ns()
        if did:
            if now > begin + breath_ns:
                return BREATH
            continue
        if is_thread:
            _store(works_at, np.int32(0))
        if num_left == 0:
            _store(every_at, np.int32(0))
            return IS_OVER
        if now > begin + breath_ns:
            return BREATH
        wanted[:] = 0
        _store(setting[WORDS] + WAITS_HERE, np.int32(0))
        sleeps = True
        for queue in range(2):
            records = sums if queue == SUMS else computations
            at = np.int64(_load(setting[WORDS] + 4 * queue))
            if at < len(records):
                sleeps &= _lacks(records, at, waits, setting, wanted)
        if np.int64(_load(every_at)) != wanted[1]:
            _store(every_at, np.int32(wanted[1]))
            sleeps &= wanted[1] == 0  # what came just before was not rung
        if sleeps:
            of_bells._rest(bell, channels, seen, wanted[:1], setting[SPIN_NS], breath_ns)


class Player:
    """A slot's records, and how far they are."""

    def __init__(
        self,
        records: Sequence[np.ndarray],
        waits: np.ndarray,
        done: np.ndarray,
        bells: Bells,
        slot: int,
        ringing: np.ndarray,
        others: Sequence[tuple[int, int]],
        spans: np.ndarray,
        *,
        is_thread: bool,
        num_cores: int,
        is_timed: bool,
    ) -> None:
        """records: of SUMS and COMPUTATIONS. done: [3] int32, see WORDS. ringing: `bells` of play. is_thread: the slot
        has a thread, which lets those of shorter cohorts pass.
        """
        self.records, self.waits, self._done = records, waits, done
        setting = [bells.own, slot, done.ctypes.data, bells.spin_ns, num_cores, int(is_thread), int(is_timed)]
        self._setting, self._bells = np.array(setting, np.int64), ringing
        self._others = np.array(others, np.int64).reshape(-1, 2)
        self._rest = waits, self._setting, ringing, self._others, bells.all, spans
        self._out = np.zeros(1, np.int64)
        self._totals = [len(of_queue) for of_queue in records]
        done[:] = 0

    def play(self, seconds: float) -> int:
        """See `play`: STOPPED, IS_OVER or BREATH."""
        return play(*self.records, *self._rest, self._out, int(seconds * 1e9))

    @property
    def stopped_at(self) -> tuple[int, int]:
        """Queue and number of the record for Python."""
        queue = int(self._out[0])
        return queue, self.num_done(queue)

    def num_done(self, queue: int) -> int:
        """How many of a queue's records are done."""
        return int(self._done[queue])

    def is_over(self) -> bool:
        return self._done[0] == self._totals[0] and self._done[1] == self._totals[1]

    def tell_done(self, queue: int, at: int) -> None:
        """The work of a record for Python is done."""
        tell_done(self.records[queue], at, queue, self._setting, self._bells, self._others)
