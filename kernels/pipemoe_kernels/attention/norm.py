"""RMSNorm of the residual stream's rows, after a sum has been added to them; one block per row.

    hidden [T, H]   += sums [T, H]            if sums are given; rounded to hidden's format
    out             = hidden / sqrt(mean(hidden^2) + eps) * weight        [T, H], rounded once

Sums come in hidden's format or in float32. `out` is a matrix with rows of any stride, or wire rows whose address is
read from memory when the kernel runs (placed_rows.py), or both. Each row's sums are made in the same order for every T.

RMSNorm: Zhang and Sennrich, arXiv:1910.07467.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from pipemoe_kernels.attention.format import (
    BLOCK,
    FORMATS,
    WIDTH,
    check_rows,
    eights,
    launch_dependents,
    wait_for_earlier,
)
from pipemoe_kernels.element import load_vector, store_vector
from pipemoe_kernels.launch.kernel import INT32, WORD_POINTER, Kernel, Stream, is_hopper, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.placed_rows import PlacedRows

add, multiply, scale, sum_of_squares = eights.add, eights.multiply, eights.scale, eights.sum_of_squares
eight_of_float32, store_vector_at = eights.eight_of_float32, eights.store_vector_at
ZERO, ONE = np.float32(0.0), np.float32(1.0)
MAX_EACH = 8  # vectors of a thread, kept in registers
MAX_HIDDEN = WIDTH * BLOCK * MAX_EACH


@kernel_factory
def norm_kernel(
    dtype: torch.dtype,
    sums_dtype: torch.dtype | None,
    hidden_size: int,
    eps: float,
    placed: bool = False,
    copied: bool = True,
    threads: int = 0,
    on_hopper: bool = False,
) -> Kernel:
    """sums_dtype: None without sums. placed, copied: which of the two results there are. threads: a multiple of 32; 0
    for the usual number. on_hopper: it starts early, as only Hopper's can.
    """
    num_vectors = hidden_size // WIDTH
    threads = threads or min(BLOCK, -(-num_vectors // 32) * 32)
    each = -(-num_vectors // threads)
    eight_of, vector_of = FORMATS[dtype].eight_of, FORMATS[dtype].vector_of
    has_sums, wide_sums = sums_dtype is not None, sums_dtype == torch.float32
    sums_of = eight_of if wide_sums or not has_sums else FORMATS[sums_dtype].eight_of
    sum_over_warp = eights.sum_over(32)
    epsilon, of_row = np.float32(eps), np.float32(1 / hidden_size)
    num_warps, num_words = threads // 32, 2 * each

    def norm_rows(hidden, hidden_vectors, sums, sums_vectors, weight, out, out_vectors, place, row_bytes):
        if on_hopper:
            launch_dependents()
            wait_for_earlier()
        partial = cuda.shared.array(num_warps, types.float32)
        row = types.int64(cuda.blockIdx.x)
        thread = types.int64(cuda.threadIdx.x)
        words = cuda.local.array(num_words, types.uint64)
        total = ZERO
        for i in range(each):
            vector = i * threads + thread
            if vector < num_vectors:
                found = load_vector(hidden, row * hidden_vectors + vector)
                if has_sums:
                    if wide_sums:
                        added = eight_of_float32(sums, row * sums_vectors + vector)
                    else:
                        added = sums_of(load_vector(sums, row * sums_vectors + vector))
                    found = vector_of(add(eight_of(found), added))
                    store_vector(hidden, row * hidden_vectors + vector, found)
                words[2 * i] = found[0]
                words[2 * i + 1] = found[1]
                total += sum_of_squares(eight_of(found))
        total = sum_over_warp(total)
        if num_warps > 1:
            if thread % 32 == 0:
                partial[thread // 32] = total
            cuda.syncthreads()
            total = ZERO
            for i in range(num_warps):
                total += partial[i]
        factor = ONE / math.sqrt(total * of_row + epsilon)
        for i in range(each):
            vector = i * threads + thread
            if vector < num_vectors:
                values = scale(eight_of((words[2 * i], words[2 * i + 1])), factor)
                found = vector_of(multiply(values, eight_of(load_vector(weight, vector))))
                if copied:
                    store_vector(out, row * out_vectors + vector, found)
                if placed:
                    if row < types.int64(place[1]):
                        address = place[0] + types.uint64(row * row_bytes + 16 * vector)
                        store_vector_at(address, found)

    return Kernel(
        norm_rows,
        (
            *(WORD_POINTER, INT32, WORD_POINTER, INT32, WORD_POINTER),
            *(WORD_POINTER, INT32, WORD_POINTER, INT32),
        ),
        threads,
        hopper_only=on_hopper,
        starts_early=on_hopper,
        key=(dtype, sums_dtype, hidden_size, eps, placed, copied, threads, on_hopper),
    )


def norm_rows(
    stream: Stream,
    hidden: torch.Tensor,
    sums: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    placed: PlacedRows | None = None,
    kernel: Kernel | None = None,
) -> None:
    """hidden [T, H] bfloat16 or float16 (H a multiple of 8, at most MAX_HIDDEN), to which sums [T, H] are added in
    place; weight [H]; the norm goes to out [T, H], to `placed` rows, or both. T may be 0.
    """
    num_tokens, width = hidden.shape
    assert out is not None or placed is not None
    check_rows(hidden, *(t for t in (sums, out) if t is not None))
    assert width <= MAX_HIDDEN and weight.shape == (width,) and weight.is_contiguous() and weight.dtype == hidden.dtype
    for t in (sums, out):
        assert t is None or t.shape == hidden.shape, (t.shape, hidden.shape)
    assert out is None or out.dtype == hidden.dtype, out.dtype
    if placed is not None:
        placed.check()
    if num_tokens == 0:
        return
    kernel = kernel or norm_kernel(
        *(hidden.dtype, None if sums is None else sums.dtype, width, eps, placed is not None, out is not None),
        on_hopper=is_hopper(stream.device_index),
    )
    kernel.launch(
        stream,
        (num_tokens, 1),
        hidden,
        hidden.stride(0) // WIDTH,
        weight if sums is None else sums,
        0 if sums is None else sums.stride(0) // WIDTH,
        weight,
        weight if out is None else out,
        0 if out is None else out.stride(0) // WIDTH,
        weight if placed is None else placed.place,
        0 if placed is None else placed.row_bytes,
    )
