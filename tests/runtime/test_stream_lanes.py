"""Lanes on streams, by a stand-in for torch's: what waits for what, whose events they are, and what time they give."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from pipemoe.errors import FatalError
from pipemoe.runtime import stream_lanes as stream_lanes_module
from pipemoe.runtime.stream_lanes import EventPool, StreamClock, StreamLane, stream_lanes
from pipemoe_kernels.launch import driver


class Cuda:
    """Streams and events that note what they are told, in `log`. An event is known by the number of its handle, a
    stream by the handle.
    """

    def __init__(self, monkeypatch):
        self.log, self.current, self.num_events = [], "default", 0
        self.timed, self.passed, self.at = set(), set(), {}  # events
        monkeypatch.setattr(torch.cuda, "set_stream", self.set_stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch._C, "_cuda_getCurrentRawStream", lambda device: self.current.cuda_stream, raising=False
        )
        monkeypatch.setattr(driver, "enter_context", lambda device: None)
        monkeypatch.setattr(driver, "new_event", self.new_event)
        monkeypatch.setattr(driver, "record_event", lambda event, stream: self.log.append(f"{event} on {stream}"))
        monkeypatch.setattr(driver, "wait_event", lambda stream, event: self.log.append(f"{stream} waits for {event}"))
        monkeypatch.setattr(driver, "has_passed", lambda event: event in self.passed)
        monkeypatch.setattr(driver, "milliseconds_between", lambda event, later: self.at[later] - self.at[event])

    def set_stream(self, stream):
        self.current = stream

    def stream(self, name):
        synchronize = lambda: self.log.append(f"{name} synchronised")  # noqa: E731
        return SimpleNamespace(device="cuda:0", cuda_stream=name, synchronize=synchronize)

    def new_event(self, timed=False):
        self.num_events += 1
        if timed:
            self.timed.add(self.num_events)
        return self.num_events

    def lanes(self, *names, num_events=8):
        clock = StreamClock(self.stream("clock"))
        events = EventPool(num_events)
        return clock, *(StreamLane(self.stream(name), clock, events) for name in names)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_a_stream_waits_works_and_records(cuda):
    _, a, b = cuda.lanes("a", "b")
    first = a.submit(lambda: cuda.log.append(f"work on {cuda.current.cuda_stream}"))
    second = b.submit(lambda: cuda.log.append(f"more on {cuda.current.cuda_stream}"), [None, first])
    assert cuda.log == [
        "work on a", f"{first.handle} on a", f"b waits for {first.handle}", "more on b", f"{second.handle} on b",
    ]  # fmt: skip
    assert cuda.current == "default" and first.handle not in cuda.timed
    assert not first.done()
    cuda.passed.add(first.handle)
    assert first.done()
    cuda.passed.clear()
    assert first.done()  # what has passed is not asked again


def test_a_stream_does_not_wait_for_itself(cuda):
    _, a = cuda.lanes("a")
    first = a.submit(lambda: None)
    second = a.submit(lambda: None, [first])
    assert cuda.log == [f"{first.handle} on a", f"{second.handle} on a"]


def test_events_are_made_at_set_up_and_used_again(cuda):
    clock, a = cuda.lanes("a", num_events=3)
    made = cuda.num_events
    for _ in range(10):
        held = [a.submit(lambda: None) for _ in range(3)]
        a.submit(lambda: None, timed=True)
        assert len({event.handle for event in held}) == 3
        del held
    assert cuda.num_events == made
    held = [a.submit(lambda: None) for _ in range(5)]  # more than are there
    assert cuda.num_events == made + 2 and len({event.handle for event in held}) == 5
    clock.start(False)
    assert cuda.num_events == made + 2


def test_work_that_raises_leaves_the_default_stream(cuda):
    def broken():
        raise ValueError("planted")

    _, a = cuda.lanes("a")
    with pytest.raises(ValueError, match="planted"):
        a.submit(broken)
    assert cuda.current == "default"


@pytest.mark.parametrize(("all_timed", "this_one"), [(False, False), (False, True), (True, False)])
def test_times_are_seconds_of_the_hosts_clock(cuda, monkeypatch, all_timed, this_one):
    monkeypatch.setattr(stream_lanes_module.time, "perf_counter", lambda: 50.0)
    clock, a = cuda.lanes("a")
    clock.start(all_timed)
    origin = clock.origin[0].handle
    assert cuda.log == [f"{origin} on clock", "clock synchronised"] and origin in cuda.timed
    event = a.submit(lambda: cuda.log.append("work"), timed=this_one)
    assert (event.handle in cuda.timed) == (all_timed or this_one)
    *begin, work, end = cuda.log[2:]
    assert (len(begin), work, end) == (1 if all_timed else 0, "work", f"{event.handle} on a")
    cuda.at = {origin: 1000.0, event.handle: 3500.0}  # milliseconds of the device
    assert event.end() == 52.5
    if all_timed:
        cuda.at[int(begin[0].split()[0])] = 2000.0
        assert event.span() == (51.0, 52.5)


class Libcuda:
    """libcuda with the priorities 0 (the lowest) to -2; it notes the streams that are made."""

    def __init__(self, status=0):
        self.made, self._status = [], status

    def cuCtxGetStreamPriorityRange(self, lowest, highest):  # noqa: N802
        lowest._obj.value, highest._obj.value = 0, -2
        return self._status

    def cuStreamCreateWithPriority(self, stream, flags, priority):  # noqa: N802
        self.made.append((flags.value, priority.value))
        stream._obj.value = len(self.made)
        return self._status


def external_stream(value, device):
    return SimpleNamespace(cuda_stream=value, device=device)


def test_streams_by_priority(cuda, monkeypatch):
    """Communication before all computation, lower slots before higher ones, as far as there are priorities."""
    libcuda = Libcuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libcuda)
    monkeypatch.setattr(torch.cuda, "ExternalStream", external_stream)
    lanes = stream_lanes("cuda:0", 3)
    assert libcuda.made == [(1, 0)] + [
        (1, p) for compute in (-1, 0, 0) for p in (compute, -2, -2)
    ]  # the clock's, then the slots'
    assert [lane.handle for s in lanes.slots for lane in (s.compute, s.dispatch, s.combine)] == list(range(2, 11))
    cuda.current = cuda.stream("current")
    mark = lanes.new_mark()
    mark.record()
    assert cuda.log == [f"{mark.handle} on current"]


def test_a_slot_of_a_rank_without_peers_is_one_stream(cuda, monkeypatch):
    libcuda = Libcuda()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libcuda)
    monkeypatch.setattr(torch.cuda, "ExternalStream", external_stream)
    lanes = stream_lanes("cuda:0", 2, alone=True)
    assert libcuda.made == [(1, 0), (1, -1), (1, 0)]
    assert all(slot.compute is slot.dispatch is slot.combine for slot in lanes.slots)


def test_errors_of_the_driver_are_named(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libcuda(status=100))
    with pytest.raises(FatalError, match="cuCtxGetStreamPriorityRange failed: CUDA driver error 100"):
        stream_lanes("cuda:0", 1)
