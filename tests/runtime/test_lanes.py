"""The host's lanes and events: what runs in which order, what waits for what, and where an error comes out."""

import threading

import pytest

from pipemoe.runtime.lanes import HostEvent, HostMark, PolledLane, WorkerLane, host_lanes

PATIENCE = 60  # seconds for a thread that is to do something: only a fault takes so long


@pytest.fixture
def worker():
    """A lane, and how often it said that it was done with something."""
    said = threading.Semaphore(0)
    lane = WorkerLane("test lane", said.release)
    yield lane, said
    lane.close()


def test_a_worker_runs_in_order_on_a_thread_of_its_own(worker):
    lane, said = worker
    order = []
    events = [lane.submit(lambda n=n: order.append((n, threading.current_thread().name))) for n in range(5)]
    assert events[-1].wait(PATIENCE) and all(event.done() for event in events)
    assert order == [(n, "test lane") for n in range(5)]
    assert all(said.acquire(timeout=PATIENCE) for _ in range(5)) and not said.acquire(blocking=False)
    spans = [event.span() for event in events]
    assert all(begin <= end for begin, end in spans) and all(a[1] <= b[0] for a, b in zip(spans, spans[1:]))
    assert [event.end() for event in events] == [end for _, end in spans]


def test_a_worker_waits_for_events_of_others(worker):
    lane, _ = worker
    order, waiting = [], threading.Semaphore(0)

    class Noted(HostEvent):
        """Says that somebody is about to wait for it."""

        def wait(self, seconds=None):
            waiting.release()
            return super().wait(seconds)

    first, second = Noted(), Noted()
    event = lane.submit(lambda: order.append("work"), [first, None, second])
    behind = lane.submit(lambda: order.append("behind"))
    for other in (first, second):
        assert waiting.acquire(timeout=PATIENCE)
        order.append("set")
        assert not event.done() and not behind.done()
        other.set()
    assert behind.wait(PATIENCE) and order == ["set", "set", "work", "behind"]


def test_what_work_raised_is_raised_by_its_event_and_those_that_wait_for_it(worker):
    lane, said = worker
    ran = []

    def broken():
        raise ValueError("planted")

    events = [lane.submit(broken), lane.submit(lambda: ran.append("independent"))]
    events.append(lane.submit(lambda: ran.append("dependent"), [events[0]]))
    assert all(said.acquire(timeout=PATIENCE) for _ in range(3))
    for event in (events[0], events[2]):
        with pytest.raises(ValueError, match="planted"):
            event.done()
    assert events[1].done() and ran == ["independent"]


def test_a_closed_worker_finishes_what_it_has():
    order = []
    lane = WorkerLane("closing lane", lambda: None)
    lane.submit(lambda: order.append(1))
    last = lane.submit(lambda: order.append(2))
    thread = next(t for t in threading.enumerate() if t.name == "closing lane")
    lane.close()
    thread.join(PATIENCE)
    assert not thread.is_alive() and last.done() and order == [1, 2]


def test_an_event_is_done_when_it_is_set():
    event = HostEvent()
    assert not event.done() and not event.wait(0)
    event.begin()
    event.set()
    assert event.done() and event.wait(0) and event.span()[0] <= event.span()[1] == event.end()


def test_a_mark_is_recorded_in_the_middle_of_work():
    said = []
    mark = HostMark(lambda: said.append(1))
    assert not mark.done()
    mark.record()
    assert mark.done() and said == [1]


class Posted:
    """An operation of a polled lane: under way until `complete`."""

    def __init__(self, order, name):
        self.order, self.name, self.complete = order, name, False

    def __call__(self):
        self.order.append(self.name)
        return lambda: self.complete


def test_a_polled_lane_posts_in_order_and_a_few_at_once():
    lane, order = PolledLane(), []
    posted = [Posted(order, n) for n in range(7)]
    events = [lane.submit(p) for p in posted]
    assert order == list(range(PolledLane.MAX_POSTED)) and not any(event.done() for event in events)
    posted[1].complete = True
    lane.poll()
    assert not events[1].done() and order == list(
        range(PolledLane.MAX_POSTED)
    )  # in order: the first one is not complete
    posted[0].complete = True
    lane.poll()
    assert [event.done() for event in events] == [True, True] + 5 * [False]
    lane.poll()
    assert order == list(range(PolledLane.MAX_POSTED + 2))
    for p in posted:
        p.complete = True
    for _ in posted:
        lane.poll()
    assert order == list(range(7)) and all(event.done() for event in events)


def test_a_polled_lane_holds_all_behind_what_waits():
    lane, order, gate = PolledLane(), [], HostEvent()
    held = lane.submit(lambda: order.append("held"), [None, gate])
    behind = lane.submit(lambda: order.append("behind"))
    lane.poll()
    assert not order and not held.done() and not behind.done()
    gate.set()
    lane.poll()
    assert order == ["held", "behind"] and held.done() and behind.done()  # complete at once: they returned no test


def test_a_polled_lane_raises_what_it_waited_for():
    lane, gate = PolledLane(), HostEvent()
    lane.submit(lambda: None, [gate])
    gate.set(ValueError("planted"))
    with pytest.raises(ValueError, match="planted"):
        lane.poll()


def test_host_lanes_are_three_per_slot_and_poll_the_communication():
    said = threading.Semaphore(0)
    lanes = host_lanes(2, said.release)
    try:
        assert len({id(lane) for s in lanes.slots for lane in (s.compute, s.dispatch, s.combine)}) == 6
        gate, order = HostEvent(), []
        for s in lanes.slots:
            s.dispatch.submit(lambda: order.append("dispatch"), [gate])
            s.combine.submit(lambda: order.append("combine"), [gate])
        gate.set()
        lanes.poll()
        assert order == ["dispatch", "combine"] * 2
        events = [s.compute.submit(lambda: order.append("compute")) for s in lanes.slots]
        assert all(event.wait(PATIENCE) for event in events)
        lanes.new_mark().record()
        assert all(said.acquire(timeout=PATIENCE) for _ in range(3))  # two pieces of work and a mark
    finally:
        lanes.close()
