"""How soon Linux gives a thread a core: its niceness, and its slice.

A thread that runs keeps its core until its slice is over, which the kernel sees at its clock's next tick, every 4 ms as
most are built. A thread that wakes up takes the core at once only if its own slice is shorter (since Linux 6.12; older
kernels ignore slices). That holds also among ranks in sessions of their own, where niceness does not (autogroup).
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading

SHORTEST_SLICE_NS = 100_000  # that Linux takes
_SET_ATTRIBUTES = {"x86_64": 314, "aarch64": 274}.get(platform.machine(), -1)  # Linux's number of the system call
_KEEP_POLICY = 8


def nicer_by(niceness: int) -> None:
    """This thread, for good: an unprivileged thread cannot come back."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + niceness)


def ask_for_slice(ns: int) -> bool:
    """Of this thread. False where the system has no such call, or refuses it: then the slice is the usual one."""
    if platform.system() != "Linux" or _SET_ATTRIBUTES < 0:
        return False
    thread = threading.get_native_id()
    niceness = os.getpriority(os.PRIO_PROCESS, thread)
    # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
    attributes = struct.pack("IIQiIQQQ", 48, 0, _KEEP_POLICY, niceness, 0, ns, 0, 0)
    return ctypes.CDLL(None).syscall(_SET_ATTRIBUTES, thread, attributes, 0) == 0
