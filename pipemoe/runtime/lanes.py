"""Lanes and events: queues of work that run in order, and the points in them for which other lanes wait.

The executor is written once against these two protocols. On a GPU a lane is a CUDA stream, and an event a CUDA event.
On the host a compute lane is a worker thread; a communication lane is a queue of non-blocking operations that the
conductor polls.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipemoe.errors import FatalError
from pipemoe.torch_state import no_grad_on_this_thread

# CUDA events made at set-up, per slot: several times what MAX_GROUPS lets a step have under way. Timed ones: a step's
# starts and ends; what times every operation makes more.
NUM_EVENTS, NUM_TIMED_EVENTS = 512, 64


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


_waiting = threading.Lock()  # for who makes an event's flag


class HostEvent:
    """An event of the host lanes. Most are only polled, so the flag to wait by is made for who waits."""

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


class StreamEvent:
    """A CUDA event on loan from a pool, to which it goes back by itself. A timed one gets host time from the lane's
    origin.
    """

    __slots__ = ("_begin", "_origin", "_passed", "_pool", "handle", "lane")

    def __init__(
        self,
        pool: EventPool,
        lane: StreamLane | None = None,
        begin: StreamEvent | None = None,
        origin: tuple[StreamEvent, float] | None = None,
    ) -> None:
        """lane: in which it is recorded; work of the same lane comes after it anyway."""
        self._pool, self.lane, self._begin, self._origin, self._passed = pool, lane, begin, origin, False
        self.handle = pool.take()

    def __del__(self) -> None:
        self._pool.give(self.handle)

    def record(self, stream: int) -> None:
        """Mark the point after all that was enqueued on a stream."""
        self._pool.driver.record_event(self.handle, stream)

    def let_wait(self, stream: int) -> None:
        """Work that is enqueued on a stream from now on comes after the event."""
        self._pool.driver.wait_event(stream, self.handle)

    def done(self) -> bool:
        self._passed = self._passed or self._pool.driver.has_passed(self.handle)
        return self._passed

    def span(self) -> tuple[float, float]:
        assert self._begin is not None  # of timed work
        return self._begin.end(), self.end()

    def end(self) -> float:
        assert self._origin is not None  # a lane's event; marks have no time
        event, at = self._origin
        return at + self._pool.driver.milliseconds_between(event.handle, self.handle) / 1e3


class EventPool:
    """CUDA events, made at set-up: the driver may allocate for one that it has to make inside a step (`reserve`)."""

    def __init__(self, num_events: int, *, timed: bool = False) -> None:
        from pipemoe_kernels.launch import driver

        self.driver, self._timed = driver, timed
        self._free = [driver.new_event(timed) for _ in range(num_events)]

    def take(self) -> int:
        """The handle of an event; a new one only if all are out on loan."""
        try:
            return self._free.pop()
        except IndexError:
            return self.driver.new_event(self._timed)

    def give(self, handle: int) -> None:
        self._free.append(handle)


class StreamMark(StreamEvent):
    """A mark that is recorded on the current stream."""

    __slots__ = ()

    def record(self, stream: int | None = None) -> None:
        import torch

        if stream is None:
            device_index = torch.cuda.current_device()
            self._pool.driver.enter_context(device_index)  # a caller's thread may have none yet
            stream = torch._C._cuda_getCurrentRawStream(device_index)
        super().record(stream)


class StreamClock:
    """The last point at which host time and device time were compared, for all streams of a device."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.events = stream, EventPool(NUM_TIMED_EVENTS, timed=True)
        self.origin: tuple[StreamEvent, float] | None = None
        self.timed = False  # time all work, not only work that asks for it

    def start(self, timed: bool) -> None:
        event = StreamEvent(self.events)
        event.record(self._stream.cuda_stream)
        self._stream.synchronize()  # the stream is idle between steps
        self.origin, self.timed = (event, time.perf_counter()), timed


class HostClock:
    """Nothing to start: host lanes time all work with the host's clock."""

    def start(self, timed: bool) -> None:
        pass


class StreamLane:
    """A CUDA stream; work only enqueues."""

    def __init__(self, stream: Any, clock: StreamClock, events: EventPool) -> None:
        import torch

        self.stream, self.handle, self._clock, self._events = stream, stream.cuda_stream, clock, events
        self._default = torch.cuda.default_stream(stream.device)

    def submit(self, work: Callable[[], Any], waits: Iterable[Any] = (), timed: bool = False) -> StreamEvent:
        import torch

        clock, begin = self._clock, None
        # Not torch.cuda.stream(): its checks take ten times as long.
        torch.cuda.set_stream(self.stream)
        try:
            for other in waits:
                if other is not None and other.lane is not self:
                    other.let_wait(self.handle)
            if clock.timed:
                begin = StreamEvent(clock.events, self, None, clock.origin)
                begin.record(self.handle)
            work()
            event = StreamEvent(clock.events if clock.timed or timed else self._events, self, begin, clock.origin)
            event.record(self.handle)
        finally:
            torch.cuda.set_stream(self._default)
        return event

    def poll(self) -> None:
        pass

    def close(self) -> None:
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
    clock: StreamClock | HostClock
    new_mark: Callable[[], Mark]  # for work of compute lanes

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


def stream_lanes(device: Any, num_slots: int, *, alone: bool = False) -> Lanes:
    """Lanes on streams whose priority falls with the slot. Communication goes before all computation, since its few
    thread blocks must not queue behind a kernel that fills the GPU.

    The streams are made one after another. torch would make 128 at once; streams beyond CUDA_DEVICE_MAX_CONNECTIONS
    share hardware queues, where a waiting cohort holds up another. alone: a rank without peers has nothing to send, so
    a slot's three lanes are one.
    """
    lowest, highest = _priorities()
    clock, events = StreamClock(_new_stream(device, lowest)), EventPool(NUM_EVENTS * num_slots)
    slots = []
    for slot in range(num_slots):
        priorities = (min(lowest, highest + 1 + slot), highest, highest)
        lanes = [StreamLane(_new_stream(device, p), clock, events) for p in priorities[: 1 if alone else 3]]
        slots.append(SlotLanes(*(lanes * 3 if alone else lanes)))
    return Lanes(slots, clock, lambda: StreamMark(events))


def _priorities() -> tuple[int, int]:
    """The lowest and the highest stream priority; a higher one is a smaller number."""
    lowest, highest = ctypes.c_int(), ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuCtxGetStreamPriorityRange(ctypes.byref(lowest), ctypes.byref(highest))
    if status:
        raise FatalError(f"cuCtxGetStreamPriorityRange failed: CUDA driver error {status}")
    return lowest.value, highest.value


def _new_stream(device: Any, priority: int) -> Any:
    """A non-blocking stream of the current context, kept until the process ends."""
    import torch

    stream, non_blocking = ctypes.c_void_p(), ctypes.c_uint(1)
    status = ctypes.CDLL("libcuda.so.1").cuStreamCreateWithPriority(
        ctypes.byref(stream), non_blocking, ctypes.c_int(priority)
    )
    if status:
        raise FatalError(f"cuStreamCreateWithPriority failed: CUDA driver error {status}")
    return torch.cuda.ExternalStream(stream.value, device=device)
