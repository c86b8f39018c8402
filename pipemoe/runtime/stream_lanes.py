"""Lanes on a GPU: CUDA streams, and CUDA events from a pool."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable
from typing import Any

from pipemoe.errors import FatalError
from pipemoe.runtime.lanes import Lanes, SlotLanes

# CUDA events made at set-up, per slot: several times what MAX_GROUPS lets a step have under way. Timed ones: a step's
# starts and ends; what times every operation makes more.
NUM_EVENTS, NUM_TIMED_EVENTS = 512, 64
# The clocks of host and device are compared again after so long; until then they part by less than an event is exact.
_ORIGIN_SECONDS = 0.5


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
        """lane: where it is recorded. Later work of that lane need not wait for it."""
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
    """Turns device time into host time: remembers when the two were last compared, for all streams of a device."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.events = stream, EventPool(NUM_TIMED_EVENTS, timed=True)
        self.origin: tuple[StreamEvent, float] | None = None
        self.timed = False  # time all work, not only work that asks for it

    def start(self, timed: bool) -> None:
        self.timed = timed
        if self.origin is not None and time.perf_counter() - self.origin[1] < _ORIGIN_SECONDS:
            return  # other slots' rounds may be under way: wait for the device as seldom as may be
        event = StreamEvent(self.events)
        event.record(self._stream.cuda_stream)
        self._stream.synchronize()  # nothing else runs in it
        self.origin = event, time.perf_counter()


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
