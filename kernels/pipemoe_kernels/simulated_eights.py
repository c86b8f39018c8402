"""What the intrinsics of ptx/eights.py do, in Python for the CUDA simulator. A block must be one warp."""

import ctypes

import numpy as np
import torch

from pipemoe_kernels.simulated_warp import _of_all_lanes


def _eight(vector, dtype):
    words = torch.from_numpy(np.array(vector, np.uint64).view(np.int16).copy())
    return words.view(dtype).float().numpy()


def _vector(eight, dtype):
    words = torch.from_numpy(np.asarray(eight, np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint64)
    return words[0], words[1]


def eight_of_bf16(vector):
    return _eight(vector, torch.bfloat16)


def eight_of_half(vector):
    return _eight(vector, torch.float16)


def bf16_of(eight):
    return _vector(eight, torch.bfloat16)


def half_of(eight):
    return _vector(eight, torch.float16)


def eight_of_float32(pointer, index):
    return pointer[4 * index : 4 * index + 4].view(np.float32)


def add(a, b):
    return a + b


def multiply(a, b):
    return a * b


def scale(a, factor):
    return a * np.float32(factor)


def swap_pairs(a):
    return a[np.arange(8) ^ 1]


def sum_of_squares(a):
    total = np.float32(0)
    for value in a:
        total += value * value
    return total


def store_vector_at(address, vector):
    (ctypes.c_uint64 * 2).from_address(int(address))[:] = [int(word) for word in vector]


def store_word_at(address, word):
    ctypes.c_uint32.from_address(int(address)).value = int(np.asarray(word).view(np.uint32))


def element_address(pointer, index):
    return pointer.ctypes.data + pointer.itemsize * int(index)


def sum_over(width):
    def sum_over_lanes(value):
        lane, values = _lane_and_values(value)
        for distance in (1 << n for n in reversed(range(width.bit_length() - 1))):
            values = values + values[np.arange(32) ^ distance]
        return values[lane]

    return sum_over_lanes


def _lane_and_values(value):
    import threading

    return threading.current_thread().threadIdx.x, np.array(_of_all_lanes(value), np.float32)
