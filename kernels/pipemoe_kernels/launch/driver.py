"""The few CUDA driver calls behind a launch, by ctypes: they cost microseconds, Numba's dispatcher tens of them."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache

# Constants of cuda.h.
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_WITHOUT_TIMING = 2  # CU_EVENT_DISABLE_TIMING
NOT_READY = 600  # CUDA_ERROR_NOT_READY
_TENSOR_MAP_TYPES = {"uint8": 0, "float16": 6, "float32": 7, "bfloat16": 9}  # CU_TENSOR_MAP_DATA_TYPE_...
_NO_INTERLEAVE, _NO_SWIZZLE, _SWIZZLE_128_BYTES, _PROMOTE_256_BYTES, _ZEROS_OUTSIDE = 0, 0, 3, 3, 0


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuInit(0)
    return library


def check(result: int, call: str) -> None:
    """Raise RuntimeError with the driver's name of an error unless `result` is 0."""
    if result:
        raise RuntimeError(f"{call} failed: {words(result)}")


def words(result: int) -> str:
    """An error's number and name."""
    name = ctypes.c_char_p()
    _library().cuGetErrorName(result, ctypes.byref(name))
    return f"CUDA driver error {result} ({(name.value or b'unknown').decode()})"


@cache
def _primary_context(device_index: int) -> ctypes.c_void_p:
    """The context that torch uses as well; held until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    check(_library().cuDeviceGet(ctypes.byref(device), device_index), "cuDeviceGet")
    check(_library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    return context


_threads = threading.local()


def enter_context(device_index: int) -> None:
    """Make the device's primary context current if the calling thread has none; a new thread cannot launch without.

    The driver is asked once per thread: nobody takes a thread's context away again.
    """
    if getattr(_threads, "has_context", False):
        return
    current = ctypes.c_void_p()
    check(_library().cuCtxGetCurrent(ctypes.byref(current)), "cuCtxGetCurrent")
    if not current.value:
        check(_library().cuCtxSetCurrent(_primary_context(device_index)), "cuCtxSetCurrent")
    _threads.has_context = True


def load_function(cubin: bytes, name: str, device_index: int, shared_bytes: int = 0) -> ctypes.c_void_p:
    """Load `cubin` into the device's primary context for the life of the process. Returns the handle of kernel `name`.

    shared_bytes: dynamic shared memory of its launches; more than 48 KB must be asked for here.
    """
    enter_context(device_index)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(_library().cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
    check(_library().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    if shared_bytes:
        result = _library().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes)
        check(result, "cuFuncSetAttribute")
    return function


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    ]


@cache
def _attributes(starts_early: bool, cluster: int) -> tuple[ctypes.Array, int]:
    """An array of CUlaunchAttribute (an int kind, 4 bytes of padding, 64 of value), and how many of them count."""
    wanted = []
    if starts_early:
        wanted.append((_PROGRAMMATIC_STREAM_SERIALIZATION, (1,)))
    if cluster > 1:
        wanted.append((_CLUSTER_DIMENSION, (cluster, 1, 1)))
    words = (ctypes.c_uint32 * (18 * max(1, len(wanted))))()
    for i, (kind, value) in enumerate(wanted):
        words[18 * i] = kind
        words[18 * i + 2 : 18 * i + 2 + len(value)] = value
    return words, len(wanted)


def launch_config(threads: int, shared_bytes: int, starts_early: bool, cluster: int = 1) -> LaunchConfig:
    """Everything about a launch but its grid and stream, which are filled in later.

    starts_early: blocks may start as soon as the kernel before allows it (programmatic dependent launch). cluster: how
    many blocks start together, side by side; grids are multiples of it.
    """
    attributes, count = _attributes(starts_early, cluster)  # its cache keeps them for every launch
    return LaunchConfig(
        1, 1, 1, (threads, 1, 1), shared_bytes, None, ctypes.addressof(attributes) if count else None, count
    )


def function(name: str) -> tuple[str, int]:
    """A function of the driver as a tape wants it: name and address."""
    address = ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value
    assert address is not None
    return name, address


def launch_call() -> Callable[..., int]:
    """cuLaunchKernelEx(config, function, addresses of the arguments, None); its result is for `check`."""
    return _library().cuLaunchKernelEx


def new_event(timed: bool = False) -> int:
    """The handle of a new event of the current context, kept until the process ends."""
    event = ctypes.c_void_p()
    check(_library().cuEventCreate(ctypes.byref(event), 0 if timed else _WITHOUT_TIMING), "cuEventCreate")
    assert event.value is not None
    return event.value


def record_event(event: int, stream: int) -> None:
    """Mark the point after all that was enqueued on the stream with this handle."""
    if result := _library().cuEventRecord(ctypes.c_void_p(event), ctypes.c_void_p(stream)):
        check(result, "cuEventRecord")


def wait_event(stream: int, event: int) -> None:
    """What is enqueued on the stream from now on comes after the event as it was recorded last."""
    if result := _library().cuStreamWaitEvent(ctypes.c_void_p(stream), ctypes.c_void_p(event), 0):
        check(result, "cuStreamWaitEvent")


def has_passed(event: int) -> bool:
    """Is all done that was enqueued before the event was recorded last?"""
    result = _library().cuEventQuery(ctypes.c_void_p(event))
    if result and result != NOT_READY:
        check(result, "cuEventQuery")
    return result == 0


def milliseconds_between(event: int, later: int) -> float:
    """On the device's clock; of timed events that have both passed."""
    found = ctypes.c_float()
    result = _library().cuEventElapsedTime(ctypes.byref(found), ctypes.c_void_p(event), ctypes.c_void_p(later))
    check(result, "cuEventElapsedTime")
    return found.value


def encode_tensor_map(
    address: int, sizes: list[int], strides: list[int], box: list[int], element: str = "bfloat16", swizzled: bool = True
) -> bytes:
    """The 128-byte map of an array, with 128-byte swizzle or none. The innermost dimension comes first, without a
    stride.

    sizes, box: elements; strides: bytes; element: "bfloat16", "float16", "float32" or "uint8".
    """
    aligned = (ctypes.c_uint64 * 24)()  # the driver wants 64-byte alignment
    target = -(-ctypes.addressof(aligned) // 64) * 64
    count = len(sizes)
    result = _library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(target),
        _TENSOR_MAP_TYPES[element],
        count,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * count)(*sizes),
        (ctypes.c_uint64 * (count - 1))(*strides),
        (ctypes.c_uint32 * count)(*box),
        (ctypes.c_uint32 * count)(*[1] * count),
        _NO_INTERLEAVE,
        _SWIZZLE_128_BYTES if swizzled else _NO_SWIZZLE,
        _PROMOTE_256_BYTES,
        _ZEROS_OUTSIDE,
    )
    check(result, "cuTensorMapEncodeTiled")
    return ctypes.string_at(target, 128)
