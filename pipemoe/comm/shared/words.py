"""Words of memory that processes share: atomic loads, stores and adds, and sleeping until a word changes (a futex).

A word is an int32 at an address, a multiple of 4. What a process has written before it stores a word (release) another
sees once it has loaded that word (acquire); NumPy's own writes promise no such thing. All functions release the GIL.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipemoe.compiled import Compiled

_FUTEX_CALL = {"x86_64": 202, "aarch64": 98}.get(platform.machine(), -1)  # Linux's number of the system call
# Not private to a process. Masks pick who is woken; the time to wake up is absolute, by the monotonic clock.
_WAIT, _WAKE, _MONOTONIC, _ALL = 9, 10, 1, 0x7FFFFFFF
_NANOSECONDS = 1_000_000_000
_system_call = types.ExternalFunction("syscall", types.int64(*[types.int64] * 7))
_pause = types.ExternalFunction("usleep", types.int32(types.uint32))
_clock = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


def has_futexes() -> bool:
    """Does this machine's kernel have them, under a number that is known here?"""
    return platform.system() == "Linux" and _FUTEX_CALL >= 0


def _word(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(32).as_pointer())


@intrinsic
def _load(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_word(builder, arguments[0]), "seq_cst", 4, typ=ir.IntType(32))

    return types.int32(types.int64), generate


@intrinsic
def _store(typing_context, address, value):
    def generate(context, builder, signature, arguments):
        builder.store_atomic(arguments[1], _word(builder, arguments[0]), "seq_cst", 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int32), generate


@intrinsic
def _add(typing_context, address, value):
    """The word's value before."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", _word(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int32(types.int64, types.int32), generate


def compiled(*signatures: Callable[[], Any]) -> Callable[[Callable], Compiled]:
    """For functions that Python calls; compiled code may call them too."""

    def decorate(function: Callable) -> Compiled:
        return Compiled(
            function,
            signatures=lambda: [make() for make in signatures],
            what="the transport over shared memory",
            nogil=True,
            error_model="numpy",
        )

    return decorate


def compiled_part(function: Callable) -> Compiled:
    return Compiled(function, inside=True, nogil=True, error_model="numpy", forceinline=True)


@compiled(lambda: types.int32(types.int64))
def load(address):
    return _load(address)


@compiled(lambda: types.void(types.int64, types.int64))
def store(address, value):
    _store(address, np.int32(value))


@compiled(lambda: types.int32(types.int64, types.int64))
def add(address, value):
    """Add to a word; its value before."""
    return _add(address, np.int32(value))


@compiled_part
def now_ns():
    """By the monotonic clock."""
    time = np.empty(2, np.int64)
    _clock(np.int32(_MONOTONIC), time.ctypes.data)
    return time[0] * _NANOSECONDS + time[1]


@compiled_part
def pause(us):
    """Sleep for so many microseconds, under a second."""
    _pause(np.uint32(us))


@compiled(lambda: types.void(types.int64, types.int64, types.int64, types.int64))
def sleep(address, seen, until_ns, mask):
    """Sleep while the word is `seen`, until the monotonic clock says `until_ns`, or `wake` is called with a mask that
    has a bit in common. May return for no reason.
    """
    time = np.empty(2, np.int64)
    time[0], time[1] = until_ns // _NANOSECONDS, until_ns % _NANOSECONDS
    _system_call(_FUTEX_CALL, address, _WAIT, seen & 0xFFFFFFFF, time.ctypes.data, 0, mask)


@compiled(lambda: types.void(types.int64, types.int64))
def wake(address, mask):
    _system_call(_FUTEX_CALL, address, _WAKE, _ALL, 0, 0, mask)
