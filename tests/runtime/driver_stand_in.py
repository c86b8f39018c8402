"""A stand-in for the CUDA driver whose functions Python and compiled code can call: it notes what is enqueued on which
stream, and what that comes after.
"""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipemoe.runtime import tapes
from pipemoe.runtime.lanes import Lanes, SlotLanes
from pipemoe.runtime.stream_lanes import EventPool, StreamClock, StreamLane, StreamMark
from pipemoe.wire import WireRows
from pipemoe_kernels.launch import driver
from pipemoe_kernels.launch.kernel import Kernel
from tests.experts import cuda_stand_in

NOT_READY, BROKEN = 600, 719
Clock = dict[int, int]  # of each stream so many pieces of work


@dataclass
class Work:
    """after: the work that must be complete before, by the streams' waits. done: what was complete when it came."""

    name: str
    arguments: tuple[Any, ...]
    after: Clock
    done: Clock


@dataclass
class Stream:
    work: list[Work] = field(default_factory=list)
    clock: Clock = field(default_factory=lambda: defaultdict(int))
    done: int = 0


class Device:
    """Streams by handle, events by handle. Nothing is done until `go_on`."""

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = defaultdict(Stream)
        self.events: dict[int, Clock | None] = {}
        self.current = 0  # the stream that torch takes
        self.calls: list[str] = []
        self.fails_at: int | None = None  # the number of the call that fails
        self._functions = []  # ctypes wants them kept

    def _call(self, name: str) -> int:
        self.calls.append(name)
        return BROKEN if self.fails_at is not None and len(self.calls) > self.fails_at else 0

    def enqueue(self, stream: int, name: str, *arguments: Any) -> int:
        if status := self._call(name):
            return status
        of = self.streams[stream]
        of.work.append(Work(name, arguments, dict(of.clock), {s: t.done for s, t in self.streams.items()}))
        of.clock[stream] += 1
        return 0

    def new_event(self, timed: bool = False) -> int:
        self.events[len(self.events) + 1] = None
        return len(self.events)

    def record(self, event: int, stream: int) -> int:
        if status := self._call("cuEventRecord"):
            return status
        assert event in self.events, f"event {event} does not exist"
        self.events[event] = dict(self.streams[stream].clock)
        return 0

    def wait(self, stream: int, event: int, flags: int = 0) -> int:
        if status := self._call("cuStreamWaitEvent"):
            return status
        clock = self.streams[stream].clock
        for other, number in (self.events[event] or {}).items():
            clock[other] = max(clock[other], number)
        return 0

    def query(self, event: int) -> int:
        clock = self.events[event] or {}
        return 0 if all(self.streams[s].done >= number for s, number in clock.items()) else NOT_READY

    def go_on(self, chance: random.Random) -> bool:
        """Complete one piece of work that may be, if there is any."""
        ready = []
        for stream in list(self.streams.values()):
            if stream.done < len(stream.work):
                after = stream.work[stream.done].after
                if all(self.streams[s].done >= number for s, number in after.items()):
                    ready.append(stream)
        if ready:
            chance.choice(ready).done += 1
        return bool(ready)

    # What the driver is called by.

    def launch(self, config: int, function: int, parameters: int, extra: int) -> int:
        of = driver.LaunchConfig.from_address(config)
        kernel = KERNELS[function]
        addresses = (ctypes.c_void_p * len(kernel.parameters)).from_address(parameters)
        values = tuple(ctypes.c_int64.from_address(a).value for a in addresses)
        starts_early = of.num_attributes > (kernel.cluster > 1)
        return self.enqueue(of.stream or 0, "kernel", kernel, (of.grid_x, of.grid_y, of.grid_z), values, starts_early)

    def graph(self, handle: int, stream: int) -> int:
        return self.enqueue(stream, "graph", handle)

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        return self.enqueue(stream, "copy", target, source, num_bytes)

    def address(self, name: str, work: Any, num_arguments: int) -> tuple[str, int]:
        function = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * num_arguments)(work)
        self._functions.append(function)
        return name, ctypes.cast(function, ctypes.c_void_p).value


KERNELS: dict[int, Kernel] = {}  # by handle


def install(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Put the stand-in in place of the driver, torch's streams and NCCL's functions."""
    device = Device()
    cuda_stand_in.install(monkeypatch)

    def load(kernel: Kernel, device_index: int) -> None:
        KERNELS[id(kernel)] = kernel
        kernel._handles[device_index] = ctypes.c_void_p(id(kernel))

    def launch(config: Any, function: Any, parameters: Any, extra: None) -> int:
        return device.launch(ctypes.addressof(config._obj), function.value, ctypes.addressof(parameters), 0)

    def check(result: int, call: str) -> None:
        if result:
            raise RuntimeError(f"{call} failed: {driver.words(result)}")

    functions = {
        "cuLaunchKernelEx": device.address("cuLaunchKernelEx", device.launch, 4),
        "cuGraphLaunch": device.address("cuGraphLaunch", device.graph, 2),
        "cuMemcpyDtoDAsync_v2": device.address("cuMemcpyDtoDAsync_v2", device.copy, 4),
        "cuEventQuery": device.address("cuEventQuery", device.query, 1),
        "cuEventRecord": device.address("cuEventRecord", device.record, 2),
        "cuStreamWaitEvent": device.address("cuStreamWaitEvent", device.wait, 3),
    }
    monkeypatch.setattr(Kernel, "load", load)
    monkeypatch.setattr(driver, "launch_call", lambda: launch)
    monkeypatch.setattr(driver, "function", functions.__getitem__)
    monkeypatch.setattr(driver, "words", lambda result: f"CUDA driver error {result}")
    monkeypatch.setattr(driver, "check", check)
    monkeypatch.setattr(driver, "new_event", device.new_event)
    monkeypatch.setattr(driver, "record_event", lambda event, stream: check(device.record(event, stream), "record"))
    monkeypatch.setattr(driver, "wait_event", lambda stream, event: check(device.wait(stream, event), "wait"))
    monkeypatch.setattr(driver, "has_passed", lambda event: device.query(event) == 0)
    monkeypatch.setattr(driver, "milliseconds_between", lambda event, later: 0.0)
    monkeypatch.setattr(tapes, "_rings", {})
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(device, "current", stream.cuda_stream))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: device.current, raising=False)
    monkeypatch.setattr(WireRows, "write", WireRows._pack)  # as on a GPU
    return device


def lanes_of(num_slots: int) -> Lanes:
    """As stream_lanes makes them for a rank without peers; streams are numbers from 1 on."""

    def stream(handle: int) -> Any:
        return SimpleNamespace(cuda_stream=handle, device="cpu", synchronize=lambda: None)

    clock, events = StreamClock(stream(99)), EventPool(64)
    slots = []
    for slot in range(num_slots):
        slots.append(SlotLanes(*[StreamLane(stream(slot + 1), clock, events)] * 3))
    return Lanes(slots, clock, lambda: StreamMark(events))
