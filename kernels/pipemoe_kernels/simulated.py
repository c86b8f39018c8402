"""What the intrinsics of ptx/access.py do, in Python for the CUDA simulator, where pointers are flat NumPy arrays."""

import numpy as np
import torch


def load_vector(pointer, index):
    return pointer[2 * index], pointer[2 * index + 1]


def store_vector(pointer, index, vector):
    pointer[2 * index] = vector[0]
    pointer[2 * index + 1] = vector[1]


def load_plain(pointer, index):
    return pointer[index]


def store_plain(pointer, index, value):
    pointer[index] = value


def load_bf16(pointer, index):
    return (pointer[index : index + 1].astype(np.uint32) << np.uint32(16)).view(np.float32)[0]


def store_bf16(pointer, index, value):
    bits = int(np.float32(value).view(np.uint32))
    is_nan = value != value
    pointer[index] = 0x7FFF if is_nan else ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def load_half(pointer, index):
    return np.float32(pointer[index : index + 1].view(np.float16)[0])


def store_half(pointer, index, value):
    pointer[index] = np.float32(value).astype(np.float16).view(np.uint16)


def load_e4m3(pointer, index):
    return torch.from_numpy(pointer[index : index + 1].copy()).view(torch.float8_e4m3fn).float().numpy()[0]


def to_e4m3(value):
    return torch.tensor([float(value)], dtype=torch.float32).to(torch.float8_e4m3fn).view(torch.uint8).numpy()[0]
