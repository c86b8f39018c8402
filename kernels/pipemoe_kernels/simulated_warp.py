"""What the intrinsics of ptx/warp.py do, in Python for the CUDA simulator. A block must be one warp."""

import threading

import numpy as np


def _of_all_lanes(value):
    """Every lane's value, in order. The simulator runs CUDA threads as Python threads; a block has a barrier."""
    thread = threading.current_thread()
    values = vars(thread._manager).setdefault("lane_values", {})
    values[thread.threadIdx.x] = value
    thread.syncthreads()
    ordered = [values[lane] for lane in range(32)]
    thread.syncthreads()
    return ordered


def max_over_lanes(value):
    return max(_of_all_lanes(np.uint32(value)))


def min_over_lanes(value):
    return min(_of_all_lanes(np.uint32(value)))


def sum_over_lanes(value):
    values = np.array(_of_all_lanes(value), np.float32)
    for distance in (16, 8, 4, 2, 1):
        values = values + values[np.arange(32) ^ distance]
    return values[0]


def from_lane(value, lane):
    return _of_all_lanes(np.float32(value))[lane]


def sync_lanes():
    threading.current_thread().syncthreads()


def launch_dependents():
    pass


def wait_for_earlier():
    pass


def bits_of(value):
    return np.float32(value).view(np.uint32)


def from_bits(bits):
    return np.uint32(bits).view(np.float32)


def round_to_bf16(value):
    bits = int(bits_of(value))
    rounded = 0x7FFF0000 if value != value else (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return from_bits(rounded)


def round_to_half(value):
    return np.float32(np.float16(value))
