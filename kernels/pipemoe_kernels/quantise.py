"""Rows to e4m3 and back: one float32 scale for each 128 columns of a row.

    x [n, H]                          values [n, H] e4m3              scales [n, H/128]
    | 128 values | ...     ->         | values * 448 / peak | ... | peak / 448 | ...      peak: their largest magnitude

One thread block per row. A thread has 8 neighbouring columns, so 16 threads share a scale; they exchange peaks through
shared memory. NaN does not count as a magnitude and stays NaN. Conversions to e4m3 need compute capability 8.9.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from pipemoe_kernels.element import ELEMENTS, load_e4m3, to_e4m3
from pipemoe_kernels.launch.kernel import BYTE_POINTER, FLOAT32_POINTER, INT32, WORD_POINTER, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda, types

BLOCK = 128
COLUMNS = 8  # of a thread: they fill one store of 8 bytes
SHARERS = BLOCK // COLUMNS
ONE = np.float32(1.0)
LARGEST = np.float32(448.0)
TO_SCALE = np.float32(1 / 448)
SMALLEST_PEAK = np.float32(1e-10)
E4M3 = torch.float8_e4m3fn
CAPABILITY = (8, 9)


@cache
def quantise_kernel(dtype: torch.dtype, threads: int = 128) -> Kernel:
    """threads: a multiple of SHARERS."""
    element = ELEMENTS[dtype]
    load = element.load

    def quantise_rows(x, x_stride, hidden, values, values_stride, scales, scales_stride):
        peaks = cuda.shared.array(threads, types.float32)
        row = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        first = thread // SHARERS * SHARERS
        for start in range(0, hidden, threads * COLUMNS):
            column = start + thread * COLUMNS
            peak = SMALLEST_PEAK
            if column < hidden:
                for i in range(COLUMNS):
                    magnitude = abs(load(x, row * x_stride + column + i))
                    if magnitude > peak:
                        peak = magnitude
            peaks[thread] = peak
            cuda.syncthreads()
            for i in range(SHARERS):
                peak = max(peak, peaks[first + i])
            cuda.syncthreads()
            if column < hidden:
                factor = ONE / peak * LARGEST
                word = types.uint64(0)
                for i in range(COLUMNS):
                    value = to_e4m3(load(x, row * x_stride + column + i) * factor)
                    word |= types.uint64(value) << types.uint64(8 * i)
                values[row * values_stride + column // COLUMNS] = word
                if thread == first:
                    scales[row * scales_stride + column // BLOCK] = peak * TO_SCALE

    parameters = (element.pointer, INT32, INT32, WORD_POINTER, INT32, FLOAT32_POINTER, INT32)
    return Kernel(quantise_rows, parameters, threads)


@cache
def dequantise_kernel(dtype: torch.dtype, threads: int = 256) -> Kernel:
    element = ELEMENTS[dtype]
    store = element.store

    def dequantise_rows(values, values_stride, scales, scales_stride, hidden, x, x_stride):
        row = cuda.blockIdx.x
        for column in range(cuda.threadIdx.x, hidden, threads):
            scale = scales[row * scales_stride + column // BLOCK]
            store(x, row * x_stride + column, load_e4m3(values, row * values_stride + column) * scale)

    parameters = (BYTE_POINTER, INT32, FLOAT32_POINTER, INT32, INT32, element.pointer, INT32)
    return Kernel(dequantise_rows, parameters, threads)


def quantise_rows(
    stream: Stream, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, kernel: Kernel | None = None
) -> None:
    """x [n, H] float32 or 16-bit -> values [n, H] float8_e4m3fn, scales [n, H/128] float32; n >= 1.

    H is a multiple of 128; all rows may be strided, those of values on boundaries of 8 bytes.
    """
    kernel = kernel or quantise_kernel(x.dtype)
    _check(x, values, scales)
    assert values.data_ptr() % COLUMNS == 0 and values.stride(0) % COLUMNS == 0, values.stride()
    sizes = (x, x.stride(0), x.shape[1], values, values.stride(0) // COLUMNS, scales, scales.stride(0))
    kernel.launch(stream, (len(x), 1), *sizes)


def dequantise_rows(
    stream: Stream, values: torch.Tensor, scales: torch.Tensor, x: torch.Tensor, kernel: Kernel | None = None
) -> None:
    """values [n, H] float8_e4m3fn, scales [n, H/128] float32 -> x [n, H] float32 or 16-bit; n >= 1, rows strided."""
    kernel = kernel or dequantise_kernel(x.dtype)
    _check(x, values, scales)
    sizes = (values, values.stride(0), scales, scales.stride(0), x.shape[1], x, x.stride(0))
    kernel.launch(stream, (len(x), 1), *sizes)


def _check(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
    num_rows, hidden = x.shape
    assert hidden % BLOCK == 0 and num_rows >= 1, x.shape
    assert x.stride(1) == values.stride(1) == 1 and (scales.stride(1) == 1 or hidden == BLOCK)
    assert values.dtype == E4M3 and values.shape == x.shape, (values.dtype, values.shape)
    assert scales.dtype == torch.float32 and scales.shape == (num_rows, hidden // BLOCK), (scales.dtype, scales.shape)
