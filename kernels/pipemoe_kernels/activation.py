"""The activation between the two GEMMs, over the valid rows of the sorted order.

    h [pairs, 2I]:  | gate (I) | up (I) |   ->   a [pairs, I] = silu(gate) * up       rows 0 .. offsets[-1]
                    | not valid         |        untouched                            rows after that

Without a gate h is [pairs, I], and a = activation(h). Other forms than silu are those of gating.py. The device reads
the number of valid rows; the grid is bounded and strides over the rows.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.gating import Gating
from pipemoe_kernels.launch.kernel import INT32, INT32_POINTER, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda

ZERO, HALF, ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
ROOT_OF_HALF = np.float32(0.5**0.5)
TANH_LINEAR, TANH_CUBIC = np.float32(2 * (2 / math.pi) ** 0.5), np.float32(0.044715)
MAX_BLOCKS = 4096


@cuda.jit(device=True, inline="always")
def silu(x, alpha):
    return x / (ONE + math.exp(-alpha * x))


@cuda.jit(device=True, inline="always")
def gelu(x, alpha):
    return HALF * x * (ONE + math.erf(ROOT_OF_HALF * x))


@cuda.jit(device=True, inline="always")
def relu(x, alpha):
    return ZERO if x < ZERO else x


@cuda.jit(device=True, inline="always")
def gelu_tanh(x, alpha):
    return x / (ONE + math.exp(-TANH_LINEAR * (x + TANH_CUBIC * x * x * x)))


@cuda.jit(device=True, inline="always")
def relu2(x, alpha):
    return ZERO if x < ZERO else x * x


FUNCTIONS = {"silu": silu, "gelu": gelu, "relu": relu, "gelu_tanh": gelu_tanh, "relu2": relu2}


@cache
def activation_kernel(
    dtype: torch.dtype, has_bias: bool, threads: int = 256, *, gating: str | Gating = "silu", gated: bool = True
) -> Kernel:
    element = ELEMENTS[dtype]
    load, store = element.load, element.store
    form = Gating.of(gating)
    activation, has_limit = FUNCTIONS[form.activation], form.limit is not None
    limit, alpha, up_offset = np.float32(form.limit or 0), np.float32(form.alpha), np.float32(form.up_offset)
    widths = 2 if gated else 1  # a row of h is this many times as wide as one of a

    def activate_rows(h, bias, offsets, num_local, intermediate, a):
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
                gate = load(h, row * widths * intermediate + column)
                if has_bias:
                    gate += load(bias, expert * widths * intermediate + column)
                if has_limit and gate > limit:
                    gate = limit
                value = activation(gate, alpha)
                if gated:
                    up = load(h, row * widths * intermediate + intermediate + column)
                    if has_bias:
                        up += load(bias, expert * widths * intermediate + intermediate + column)
                    if has_limit and up > limit:
                        up = limit
                    if has_limit and up < -limit:
                        up = -limit
                    value *= up + up_offset
                store(a, row * intermediate + column, value)

    pointer = element.pointer
    return Kernel(activate_rows, (pointer, pointer, INT32_POINTER, INT32, INT32, pointer), threads)


def activate_rows(
    stream: Stream,
    h: torch.Tensor,
    bias: torch.Tensor | None,
    offsets: torch.Tensor,
    a: torch.Tensor,
    gating: str | Gating = "silu",
    kernel: Kernel | None = None,
) -> None:
    """h [pairs, 2I] (gated) or [pairs, I], bias [E_loc, 2I or I] or None, offsets [E_loc] int32 ends -> a [pairs, I].

    Arithmetic in float32.
    """
    num_pairs, intermediate = a.shape
    gated = h.shape[1] != intermediate
    kernel = kernel or activation_kernel(h.dtype, bias is not None, gating=gating, gated=gated)
    assert h.dtype == a.dtype and h.is_contiguous() and a.is_contiguous()
    assert h.shape == (num_pairs, 2 * intermediate if gated else intermediate), (h.shape, a.shape)
    assert offsets.dtype == torch.int32 and offsets.is_contiguous()
    if bias is not None:
        assert bias.dtype == h.dtype and bias.is_contiguous() and bias.shape == (len(offsets), h.shape[1])
    grid = (min(num_pairs, MAX_BLOCKS), 1)
    kernel.launch(stream, grid, h, h if bias is None else bias, offsets, len(offsets), intermediate, a)
