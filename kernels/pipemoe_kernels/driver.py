"""The few CUDA driver calls behind a launch, by ctypes: a launch costs microseconds, Numba's dispatcher tens of them."""

from __future__ import annotations

import ctypes
from functools import cache


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuInit(0)
    return library


def _check(result: int, call: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _library().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{call} failed: CUDA driver error {result} ({(name.value or b'unknown').decode()})")


@cache
def _primary_context(device_index: int) -> ctypes.c_void_p:
    """The context that torch uses as well; held until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_library().cuDeviceGet(ctypes.byref(device), device_index), "cuDeviceGet")
    _check(_library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


def enter_context(device_index: int) -> None:
    """Make the device's primary context current if the calling thread has none: a new thread could not launch otherwise."""
    current = ctypes.c_void_p()
    _check(_library().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if not current.value:
        _check(_library().cuCtxSetCurrent(_primary_context(device_index)), "cuCtxSetCurrent")


def load_function(cubin: bytes, name: str, device_index: int) -> ctypes.c_void_p:
    """Load `cubin` into the device's primary context for the life of the process; the handle of its kernel `name`."""
    enter_context(device_index)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_library().cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
    _check(_library().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    return function


def launch(function: ctypes.c_void_p, grid: tuple[int, int], threads: int, stream: int, values: tuple[int, ...]) -> None:
    """Enqueue one kernel. Each value fills an 8-byte slot; a 32-bit parameter reads the low half (little endian)."""
    count = len(values)
    slots = (ctypes.c_int64 * count)(*values)
    base = ctypes.addressof(slots)
    pointers = (ctypes.c_void_p * count)(*range(base, base + 8 * count, 8))
    result = _library().cuLaunchKernel(
        function, grid[0], grid[1], 1, threads, 1, 1, 0, ctypes.c_void_p(stream), pointers, None
    )
    _check(result, "cuLaunchKernel")
