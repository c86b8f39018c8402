"""A stand-in for the CUDA driver and NCCL whose functions Python and compiled code can call: it notes what is enqueued
on which stream, and what that comes after.
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

from pipemoe.comm import nccl_tape
from pipemoe.comm.transport import CallLog
from pipemoe.runtime import tapes
from pipemoe.runtime.lanes import EventPool, Lanes, SlotLanes, StreamClock, StreamLane, StreamMark
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
        self.in_group = False
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

    # What the driver and NCCL are called by.

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

    def group_start(self) -> int:
        assert not self.in_group
        self.in_group = True
        return self._call("ncclGroupStart")

    def group_end(self) -> int:
        assert self.in_group
        self.in_group = False
        return self._call("ncclGroupEnd")

    def broadcast(self, send: int, receive: int, count: int, kind: int, root: int, comm: int, stream: int) -> int:
        assert self.in_group and send == receive
        return self.enqueue(stream, "broadcast", send, count, kind, root, comm)

    def reduce(self, send: int, receive: int, count: int, kind: int, op: int, root: int, comm: int, stream: int) -> int:
        assert self.in_group
        return self.enqueue(stream, "reduce", send, receive, count, kind, op, root, comm)

    def all_gather(self, send: int, receive: int, count: int, kind: int, comm: int, stream: int) -> int:
        return self.enqueue(stream, "all_gather", send, receive, count, kind, comm)

    def reduce_scatter(self, send: int, receive: int, count: int, kind: int, op: int, comm: int, stream: int) -> int:
        return self.enqueue(stream, "reduce_scatter", send, receive, count, kind, op, comm)

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
    of_nccl = [
        device.address("ncclGroupStart", device.group_start, 0),
        device.address("ncclGroupEnd", device.group_end, 0),
        device.address("ncclBroadcast", device.broadcast, 7),
        device.address("ncclReduce", device.reduce, 8),
        device.address("ncclAllGather", device.all_gather, 6),
        device.address("ncclReduceScatter", device.reduce_scatter, 7),
    ]
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
    monkeypatch.setattr(nccl_tape, "functions", lambda version: dict(zip((name for name, _ in of_nccl), of_nccl)))
    monkeypatch.setattr(tapes, "_rings", {})
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(device, "current", stream.cuda_stream))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: device.current, raising=False)
    monkeypatch.setattr(WireRows, "write", WireRows._pack)  # as on a GPU
    return device


def lanes_of(num_slots: int, *, alone: bool) -> Lanes:
    """As stream_lanes makes them; streams are numbers from 1 on."""

    def stream(handle: int) -> Any:
        return SimpleNamespace(cuda_stream=handle, device="cpu", synchronize=lambda: None)

    clock, events = StreamClock(stream(99)), EventPool(64)
    slots = []
    for slot in range(num_slots):
        lanes = [StreamLane(stream(3 * slot + kind + 1), clock, events) for kind in range(1 if alone else 3)]
        slots.append(SlotLanes(*(lanes * 3 if alone else lanes)))
    return Lanes(slots, clock, lambda: StreamMark(events))


class NcclLibrary(CallLog):
    """cupy's NCCL module over the device."""

    NCCL_UINT8, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_FLOAT16, NCCL_BFLOAT16, NCCL_SUM = 1, 7, 8, 6, 9, 0

    def __init__(self, device: Device) -> None:
        self._device, self._made = device, 0
        self.get_version = lambda: 23007
        self.groupStart, self.groupEnd = device.group_start, device.group_end

    def NcclCommunicator(self, size: int, unique_id: bytes, rank: int) -> Any:  # noqa: N802  (cupy's name)
        self._made += 1
        handle, device = 1000 + self._made, self._device
        return SimpleNamespace(
            comm=handle,
            bcast=lambda at, count, kind, root, stream: device.broadcast(at, at, count, kind, root, handle, stream),
            reduce=lambda *a: device.reduce(*a[:-1], handle, a[-1]),
            allGather=lambda *a: device.all_gather(*a[:-1], handle, a[-1]),
            reduceScatter=lambda *a: device.reduce_scatter(*a[:-1], handle, a[-1]),
            send=lambda *a: device.enqueue(a[-1], "send", handle, *a[:-1]),
            recv=lambda *a: device.enqueue(a[-1], "recv", handle, *a[:-1]),
        )
