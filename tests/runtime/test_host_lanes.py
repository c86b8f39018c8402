"""The lanes of ranks that share memory: one thread for all of a slot's work, the conductor's own or the slot's."""

import ctypes
import os
import platform
import struct
import threading

import numpy as np
import pytest

from pipemoe.comm.shared import words
from pipemoe.comm.shared.bells import Bells
from pipemoe.comm.shared.flags import FlagEvent
from pipemoe.runtime import thread_class
from pipemoe.runtime.host_lanes import HostLanes, _niceness
from pipemoe.runtime.lanes import HostEvent

PATIENCE = 60  # seconds for a thread that is to do something: only a fault takes so long
NUM_SLOTS = 3


@pytest.fixture
def lanes():
    memory = np.zeros(Bells.num_bytes(NUM_SLOTS) + 64, np.uint8)
    address = memory.ctypes.data + -memory.ctypes.data % 64
    made = HostLanes(NUM_SLOTS, Bells(0, [address], NUM_SLOTS, 0.0))
    made.memory = memory  # kept alive
    yield made
    made.close()


class Flag:
    def __init__(self):
        self._memory = np.zeros(1, np.int32)
        self.event = FlagEvent(np.array([self._memory.ctypes.data], np.int64), 7)

    def up(self):
        words.store(self._memory.ctypes.data, 7)


def note(order, name):
    return lambda: order.append((name, threading.current_thread().name))


def test_one_cohorts_work_is_done_by_whoever_polls(lanes):
    lanes.begin({1})
    order, flag = [], Flag()
    slot, here = lanes.slots[1], threading.current_thread().name
    attended = slot.compute.submit(note(order, "attend"))
    computed = slot.compute.submit(note(order, "experts"), [attended, flag.event])
    summed = slot.combine.submit(note(order, "sum"), [computed])
    behind = slot.compute.submit(note(order, "next attend"), [summed])
    assert not order
    lanes.poll()
    assert order == [("attend", here)] and attended.done() and not computed.done()
    flag.up()
    lanes.poll()
    assert order == [(name, here) for name in ("attend", "experts", "sum", "next attend")] and behind.done()


def test_each_of_several_cohorts_has_a_thread_and_none_waits_for_another(lanes):
    lanes.begin({0, 2})
    order, gate, flag = [], threading.Event(), Flag()
    held = lanes.slots[0].compute.submit(lambda: gate.wait(PATIENCE))
    waits = lanes.slots[2].compute.submit(note(order, "waits"), [flag.event])
    sums = lanes.slots[2].combine.submit(note(order, "sums"))
    assert sums.wait(PATIENCE) and order == [("sums", "pipemoe slot 2")] and not waits.done() and not held.done()
    flag.up()
    assert waits.wait(PATIENCE) and not held.done()
    gate.set()
    assert held.wait(PATIENCE)


def test_a_slot_waits_for_an_event_of_another(lanes):
    lanes.begin({0, 1})
    order, gate = [], threading.Event()
    first = lanes.slots[0].compute.submit(lambda: gate.wait(PATIENCE) and order.append("first"))
    second = lanes.slots[1].compute.submit(lambda: order.append("second"), [first])
    gate.set()
    assert second.wait(PATIENCE) and order == ["first", "second"]


def test_what_work_raised_comes_out_of_its_event_and_of_those_that_wait_for_it(lanes):
    lanes.begin({0})

    def broken():
        raise ValueError("planted")

    events = [lanes.slots[0].compute.submit(broken)]
    events.append(lanes.slots[0].combine.submit(lambda: None, [events[0]]))
    fine = lanes.slots[0].compute.submit(lambda: None)
    lanes.poll()
    for event in events:
        with pytest.raises(ValueError, match="planted"):
            event.done()
    assert fine.done()


def test_the_conductor_sleeps_until_a_slots_thread_has_news(lanes):
    lanes.begin({0, 1})
    for _ in range(50):
        lanes.wake.look()
        event = lanes.slots[1].compute.submit(lambda: None)
        while not event.done():
            lanes.wake.rest(PATIENCE)
            lanes.wake.look()


def test_a_step_of_one_cohort_after_one_of_several(lanes):
    for slots in ({0, 1}, {1}, {0, 1}, {0}):
        lanes.begin(slots)
        events = [lanes.slots[slot].compute.submit(lambda: None) for slot in slots]
        lanes.poll()
        assert all(event.wait(PATIENCE) for event in events)


def test_longer_cohorts_have_nicer_threads(lanes):
    lanes.begin({0, 1, 2})
    found = {}

    def look(slot):
        return lambda: found.update({slot: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())})

    events = [lanes.slots[slot].compute.submit(look(slot)) for slot in range(3)]
    assert all(event.wait(PATIENCE) for event in events)
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert [found[slot] for slot in range(3)] == [min(19, here + _niceness(slot)) for slot in range(3)]
    assert _niceness(0) == 0 < _niceness(1) < _niceness(2) <= 15 == _niceness(30)


def _slice_of_this_thread():
    """In ns, as sched_getattr says; 0 if it does not."""
    number = {"x86_64": 315, "aarch64": 275}.get(platform.machine(), -1)
    found = ctypes.create_string_buffer(48)
    if ctypes.CDLL(None).syscall(number, threading.get_native_id(), found, len(found), 0):
        return 0
    return struct.unpack("IIQiIQQQ", found.raw)[5]


def test_the_shortest_cohorts_thread_asks_for_a_core_soonest(lanes):
    usual, found = _slice_of_this_thread(), {}
    if not usual:
        pytest.skip("this kernel has no slices of threads")
    lanes.begin({0, 1})
    events = [
        lanes.slots[slot].compute.submit(lambda slot=slot: found.update({slot: _slice_of_this_thread()}))
        for slot in range(2)
    ]
    assert all(event.wait(PATIENCE) for event in events)
    assert found[0] == thread_class.SHORTEST_SLICE_NS < usual == found[1]


def test_a_slice_that_is_refused_is_the_usual_one(monkeypatch):
    monkeypatch.setattr(thread_class, "_SET_ATTRIBUTES", 1 << 20)  # no such call
    assert not thread_class.ask_for_slice(thread_class.SHORTEST_SLICE_NS)
    monkeypatch.setattr(thread_class, "_SET_ATTRIBUTES", -1)
    assert not thread_class.ask_for_slice(thread_class.SHORTEST_SLICE_NS)


def test_a_mark_wakes_the_conductor(lanes):
    lanes.wake.look()
    mark = lanes.new_mark()
    mark.record()
    lanes.wake.rest(PATIENCE)
    assert isinstance(mark, HostEvent) and mark.done()
