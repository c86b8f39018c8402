"""Combine on the device: the weighted sum of a token's expert results, ascending k, every row written.

    positions [n, K]   weights [n, K]        y [pairs, H]         out [n, H]
      2  0              .7  .3               0 | y_0' |           .7 y[2] + .3 y[0]
     -1  1               -  .4       and     1 | y_1' |      ->   .4 y[1]
     -1 -1               -   -               2 | y_0  |           0

Sums are float32. For a float64 out, each float32 product is first rounded to a multiple of 2^-32: sums of such numbers
are exact below 2^20, so the order of addition, here and over the ranks, cannot change a bit.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.launch.kernel import FLOAT32_POINTER, INT32, INT32_POINTER, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda

# Adding and subtracting this rounds a float64 of magnitude under 2^19 to a multiple of 2^-32.
GRID_ROUNDING = np.float64(1.5 * 2.0**20)


@cache
def combine_kernel(dtype: torch.dtype, out_dtype: torch.dtype, has_bias: bool, threads: int = 256) -> Kernel:
    element, out_element = ELEMENTS[dtype], ELEMENTS[out_dtype]
    load, store = element.load, out_element.store
    on_grid = out_dtype == torch.float64
    zero = np.float64(0.0) if on_grid else np.float32(0.0)

    def combine_rows(
        y,
        y_stride,
        positions,
        ids,
        ids_stride,
        first_expert,
        weights,
        weights_stride,
        bias,
        top_k,
        hidden,
        out,
        out_stride,
    ):
        token = cuda.blockIdx.x
        for column in range(cuda.threadIdx.x, hidden, threads):
            total = zero
            for k in range(top_k):
                position = positions[token * top_k + k]
                if position >= 0:
                    value = load(y, position * y_stride + column)
                    if has_bias:
                        expert = ids[token * ids_stride + k] - first_expert
                        value += load(bias, expert * hidden + column)
                    contribution = weights[token * weights_stride + k] * value
                    if on_grid:
                        total += (np.float64(contribution) + GRID_ROUNDING) - GRID_ROUNDING
                    else:
                        total += contribution
            store(out, token * out_stride + column, total)

    return Kernel(
        combine_rows,
        (
            *(element.pointer, INT32, INT32_POINTER, INT32_POINTER, INT32, INT32, FLOAT32_POINTER, INT32),
            *(element.pointer, INT32, INT32, out_element.pointer, INT32),
        ),
        threads,
    )


def combine_rows(
    stream: Stream,
    y: torch.Tensor,
    positions: torch.Tensor,
    ids: torch.Tensor,
    first_expert: int,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kernel: Kernel | None = None,
) -> None:
    """out[i] = sum of weights[i, k] * (y[p] + bias[ids[i, k] - first_expert]), p = positions[i, k], over k with p >= 0.

    y [pairs, H] float32 or 16-bit; positions [n, K] int32; ids [n, K] int32 and weights [n, K] float32, rows strided;
    bias [E_loc, H] like y or None; out [n, H], n >= 1, rows strided: float32, 16-bit, or float64 (on the
    grid of 2^-32).
    """
    kernel = kernel or combine_kernel(y.dtype, out.dtype, bias is not None)
    num_rows, hidden = out.shape
    top_k = positions.shape[1]
    assert y.shape[1] == hidden and y.stride(1) == 1, y.shape
    assert positions.dtype == ids.dtype == torch.int32 and positions.is_contiguous()
    assert positions.shape == ids.shape == weights.shape == (num_rows, top_k)
    assert weights.dtype == torch.float32
    assert top_k == 1 or ids.stride(1) == weights.stride(1) == 1
    assert out.stride(1) == 1 or hidden == 1
    if bias is not None:
        assert bias.dtype == y.dtype and bias.is_contiguous() and bias.shape[1] == hidden
    kernel.launch(
        stream,
        (num_rows, 1),
        y,
        y.stride(0),
        positions,
        ids,
        ids.stride(0),
        first_expert,
        weights,
        weights.stride(0),
        y if bias is None else bias,
        top_k,
        hidden,
        out,
        out.stride(0),
    )
