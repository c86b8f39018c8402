"""Lanes and events: queues of work that run in order, and the points in them for which other lanes wait.

The executor is written once against these protocols. On a GPU a lane is a CUDA stream, and an event a CUDA event
(`stream_lanes.py`). On the host a compute lane is a worker thread; a communication lane is a queue of non-blocking
operations that the conductor polls. Where ranks share memory, `host_lanes.py` has other lanes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipemoe.torch_state import no_grad_on_this_thread


class Event(Protocol):
    """A point in a lane."""

    def done(self) -> bool:
        """Has the lane passed it? Raises what the work before it raised."""

    def span(self) -> tuple[float, float]:
        """Begin and end of the work before it, in seconds of `time.perf_counter`. Only if the lane is timed."""

    def end(self) -> float:
        """The end alone. Only if the lane or this piece of work was timed."""


class Mark(Event, Protocol):
    """An event that a piece of work records while it runs. Others may wait for it once the work has been submitted."""

    def record(self) -> None: ...


class Lane(Protocol):
    """Work handed in runs in order, each piece after the events that it waits for: those of lanes of its own kind."""

    def submit(self, work: Callable[[], Any], waits: Iterable[Event | None] = (), timed: bool = False) -> Event: ...

    def poll(self) -> None:
        """Advance work that needs polling."""

    def close(self) -> None: ...


class Clock(Protocol):
    """What events' times are read from."""

    def start(self, timed: bool) -> None:
        """A step begins, and no lane has work. timed: time all of the step's work, not only what asks for it."""


_waiting = threading.Lock()  # held to make an event's flag


class HostEvent:
    """An event of the host lanes. Most are only polled, so a flag to wait on is made by whoever waits first."""

    __slots__ = ("_begin", "_end", "_flag", "_is_set", "error")

    def __init__(self) -> None:
        self._flag: threading.Event | None = None
        self._is_set = False
        self.error: BaseException | None = None  # what the work raised
        self._begin = self._end = 0.0

    def begin(self) -> None:
        self._begin = time.perf_counter()

    def set(self, error: BaseException | None = None) -> None:
        self._end = time.perf_counter()
        self.error = error
        self._is_set = True  # before the flag is looked at: who makes one looks at this afterwards
        if self._flag is not None:
            self._flag.set()

    def wait(self, seconds: float | None = None) -> bool:
        if not self._is_set:
            with _waiting:
                self._flag = flag = self._flag or threading.Event()
            if not self._is_set:
                flag.wait(seconds)
        return self._is_set

    def done(self) -> bool:
        if not self._is_set:
            return False
        if self.error is not None:
            raise self.error
        return True

    def is_over(self) -> bool:
        """Has the lane passed it, whatever the work before it raised?"""
        return self._is_set

    def span(self) -> tuple[float, float]:
        return self._begin, self._end

    def end(self) -> float:
        return self._end


class HostMark(HostEvent):
    """A mark that a worker records; calls `on_done`, as finished work does."""

    __slots__ = ("_on_done",)

    def __init__(self, on_done: Callable[[], None]) -> None:
        super().__init__()
        self._on_done = on_done

    def record(self) -> None:
        self.begin()
        self.set()
        self._on_done()


class WorkerLane:
    """A host thread that runs its work in order, and calls `on_done` after each piece."""

    def __init__(self, name: str, on_done: Callable[[], None]) -> None:
        self._on_done = on_done
        self._queue: deque[tuple[Callable[[], Any], Sequence[HostEvent], HostEvent] | None] = deque()
        self._filled = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], Any], waits: Iterable[Any] = (), timed: bool = False) -> HostEvent:
        event = HostEvent()
        self._queue.append((work, [w for w in waits if w is not None], event))
        self._filled.release()
        return event

    def _run(self) -> None:
        no_grad_on_this_thread()
        while True:
            self._filled.acquire()
            item = self._queue.popleft()
            if item is None:
                return
            work, waits, event = item
            try:
                for other in waits:
                    other.wait()
                    other.done()  # raises what went wrong there
                event.begin()
                work()
                event.set()
            except BaseException as error:  # noqa: BLE001  (handed to whoever polls the event)
                event.set(error)
            self._on_done()
            del item, work, waits, event  # do not keep a step's tensors alive while idle

    def poll(self) -> None:
        pass

    def close(self) -> None:
        self._queue.append(None)
        self._filled.release()


class PolledLane:
    """A queue of non-blocking host operations, posted and tested by the conductor's thread.

    Work posts its operation and returns a `test` function (True once complete), or None if it is already complete.
    Operations are posted in order; several may be under way together, as MPI allows on one communicator.
    """

    MAX_POSTED = 4

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], Sequence[HostEvent], HostEvent]] = deque()
        self._posted: deque[tuple[Callable[[], bool], HostEvent]] = deque()

    @property
    def num_left(self) -> int:
        """Operations that are not complete."""
        return len(self._waiting) + len(self._posted)

    def submit(self, work: Callable[[], Any], waits: Iterable[Any] = (), timed: bool = False) -> HostEvent:
        event = HostEvent()
        self._waiting.append((work, [w for w in waits if w is not None], event))
        self.poll()
        return event

    def poll(self) -> None:
        while self._waiting and len(self._posted) < self.MAX_POSTED and all(w.done() for w in self._waiting[0][1]):
            work, _, event = self._waiting.popleft()
            event.begin()
            try:
                self._posted.append((work() or _at_once, event))
            except BaseException as error:
                event.set(error)
                raise
        while self._posted:
            test, event = self._posted[0]
            try:
                if not test():
                    break
            except BaseException as error:
                event.set(error)
                raise
            self._posted.popleft()
            event.set()

    def close(self) -> None:
        pass


def _at_once() -> bool:
    return True


class HostClock:
    """Nothing to start: host lanes time all work with the host's clock."""

    def start(self, timed: bool) -> None:
        pass


@dataclass(frozen=True, slots=True)
class SlotLanes:
    """The three lanes of one cohort slot."""

    compute: Lane
    dispatch: Lane
    combine: Lane


@dataclass(frozen=True, slots=True)
class Lanes:
    """All lanes of a rank."""

    slots: list[SlotLanes]
    clock: Clock
    new_mark: Callable[[], Mark]  # for work of compute lanes

    def begin(self, slots: set[int]) -> None:
        """A step uses these slots."""

    def hold_slots(self, slots: set[int]) -> None:
        """Runs of these slots may come and go side by side: here they always may."""

    def let_go_of_slots(self) -> None:
        pass

    def poll(self, between_issues: bool = False) -> None:
        """Advance all work that needs polling. between_issues: the conductor will issue more, and call again."""
        for slot in self.slots:
            slot.dispatch.poll()
            slot.combine.poll()

    def close(self) -> None:
        for slot in self.slots:
            slot.compute.close()


def host_lanes(num_slots: int, on_done: Callable[[], None]) -> Lanes:
    """on_done: called from worker threads whenever a piece of work is done."""
    slots = [
        SlotLanes(WorkerLane(f"pipemoe compute {i}", on_done), PolledLane(), PolledLane()) for i in range(num_slots)
    ]
    return Lanes(slots, HostClock(), lambda: HostMark(on_done))
