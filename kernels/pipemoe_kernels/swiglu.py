"""SwiGLU between the two GEMMs, over the valid rows of the sorted order.

    h [pairs, 2I]:  | gate (I) | up (I) |   ->   a [pairs, I] = silu(gate) * up       rows 0 .. offsets[-1]
                    | not valid         |        untouched                            rows after that

The number of valid rows is read on the device; the grid is bounded and strides over the rows.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.launch import INT32, INT32_POINTER, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda

ONE = np.float32(1.0)
MAX_BLOCKS = 4096


@cache
def swiglu_kernel(dtype: torch.dtype, has_bias: bool, threads: int = 256) -> Kernel:
    element = ELEMENTS[dtype]
    load, store = element.load, element.store

    def swiglu_rows(h, bias, offsets, num_local, intermediate, a):
        num_valid = offsets[num_local - 1]
        for row in range(cuda.blockIdx.x, num_valid, cuda.gridDim.x):
            expert = 0
            if has_bias:
                # The first expert that ends after this row.
                last = num_local - 1
                while expert < last:
                    middle = (expert + last) // 2
                    if offsets[middle] > row:
                        last = middle
                    else:
                        expert = middle + 1
            for column in range(cuda.threadIdx.x, intermediate, threads):
                gate = load(h, row * 2 * intermediate + column)
                up = load(h, row * 2 * intermediate + intermediate + column)
                if has_bias:
                    gate += load(bias, expert * 2 * intermediate + column)
                    up += load(bias, expert * 2 * intermediate + intermediate + column)
                store(a, row * intermediate + column, gate / (ONE + math.exp(-gate)) * up)

    pointer = element.pointer
    return Kernel(swiglu_rows, (pointer, pointer, INT32_POINTER, INT32, INT32, pointer), threads)


def swiglu_rows(
    stream: Stream,
    h: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    a: torch.Tensor,
    kernel: Kernel | None = None,
) -> None:
    """h [pairs, 2I], bias [E_loc, 2I] or None, offsets [E_loc] int32 ends -> a [pairs, I]; arithmetic in float32."""
    kernel = kernel or swiglu_kernel(h.dtype, bias is not None)
    num_pairs, intermediate = a.shape
    assert h.dtype == a.dtype and h.is_contiguous() and a.is_contiguous()
    assert h.shape == (num_pairs, 2 * intermediate), (h.shape, a.shape)
    assert offsets.dtype == torch.int32 and offsets.is_contiguous()
    if bias is not None:
        assert bias.dtype == h.dtype and bias.is_contiguous() and bias.shape == (len(offsets), 2 * intermediate)
    grid = (min(num_pairs, MAX_BLOCKS), 1)
    kernel.launch(stream, grid, h, h if bias is None else bias, offsets, len(offsets), intermediate, a)
