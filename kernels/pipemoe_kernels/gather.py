"""Gather: hidden values from row-strided wire rows into the sorted order of the experts.

    hidden (wire rows, row_bytes apart)              x [pairs, stride]
    | x_0 ......... | weights | ids | pad |     ->   | x_1 | pad |   position 0
    | x_1 ......... | weights | ids | pad |          | x_0 | pad |   position 1
                                                     | x_1 | pad |   position 2   (token 1 has two local experts)

One block per token: it reads the row once in 16-byte vectors and writes it at each of its positions. The last vector of
a row may reach into the weights (source) and into the padding (x); nothing reads those bytes of x.
"""

from __future__ import annotations

from functools import cache

import torch

from pipemoe_kernels.element import load_vector, store_vector
from pipemoe_kernels.launch.kernel import INT32, INT32_POINTER, WORD_POINTER, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda

VECTOR_BYTES = 16


@cache
def gather_kernel(threads: int = 128) -> Kernel:
    def gather_rows(hidden, hidden_stride, positions, top_k, num_vectors, x, x_stride):
        token = cuda.blockIdx.x
        for vector in range(cuda.threadIdx.x, num_vectors, threads):
            value = load_vector(hidden, token * hidden_stride + vector)
            for k in range(top_k):
                position = positions[token * top_k + k]
                if position >= 0:
                    store_vector(x, position * x_stride + vector, value)

    return Kernel(gather_rows, (WORD_POINTER, INT32, INT32_POINTER, INT32, INT32, WORD_POINTER, INT32), threads)


def padded_columns(columns: int, dtype: torch.dtype) -> int:
    """Columns of a matrix whose rows fill whole vectors."""
    per_vector = VECTOR_BYTES // dtype.itemsize
    return -(-columns // per_vector) * per_vector


def gather_rows(
    stream: Stream, hidden: torch.Tensor, positions: torch.Tensor, x: torch.Tensor, kernel: Kernel | None = None
) -> None:
    """x[positions[i, k], :H] = hidden[i] where positions[i, k] >= 0.

    hidden [n, H] of any dtype, n >= 1, rows on 16-byte boundaries; positions [n, K] int32; x [pairs, >= H] of the same
    dtype, rows on 16-byte boundaries.
    """
    kernel = kernel or gather_kernel()
    num_rows, columns = hidden.shape
    size = hidden.element_size()
    row_bytes, x_row_bytes = hidden.stride(0) * size, x.stride(0) * size
    num_vectors = -(-columns * size // VECTOR_BYTES)
    assert hidden.dtype == x.dtype, (hidden.dtype, x.dtype)
    assert (hidden.stride(1) == 1 or columns == 1) and x.stride(1) == 1
    assert hidden.data_ptr() % VECTOR_BYTES == 0 and x.data_ptr() % VECTOR_BYTES == 0
    assert row_bytes % VECTOR_BYTES == 0 and x_row_bytes % VECTOR_BYTES == 0, (row_bytes, x_row_bytes)
    assert row_bytes >= num_vectors * VECTOR_BYTES and x_row_bytes >= num_vectors * VECTOR_BYTES
    assert positions.dtype == torch.int32 and positions.is_contiguous() and len(positions) == num_rows
    kernel.launch(
        stream,
        (num_rows, 1),
        hidden,
        row_bytes // VECTOR_BYTES,
        positions,
        positions.shape[1],
        num_vectors,
        x,
        x_row_bytes // VECTOR_BYTES,
    )
