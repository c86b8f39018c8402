"""Pack: tokens' hidden values, router weights and expert ids into their wire rows, in one launch instead of three.

    x [n, H]      ids [n, K]   weights [n, K]            wire rows, row_bytes apart
    | x_0 ... |   | e ... |    | w ... |           ->    | x_0 ... | w ... | e ... | pad |

One block per token. Hidden values move in 16-byte vectors, weights and ids as pairs of 32 bits; the padding stays as it
is.
"""

from __future__ import annotations

import torch

from pipemoe_kernels.element import load_vector, store_vector
from pipemoe_kernels.launch.kernel import INT32, WORD_POINTER, Kernel, Stream, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types

VECTOR_BYTES = 16
WORDS = 2  # of 8 bytes, in a vector


@kernel_factory
def pack_kernel(threads: int = 128) -> Kernel:
    def pack_rows(x, x_vectors, num_vectors, ids, ids_stride, weights, weights_stride, top_k, wire, row_vectors):
        token = cuda.blockIdx.x
        thread = cuda.threadIdx.x
        for vector in range(thread, num_vectors, threads):
            store_vector(wire, token * row_vectors + vector, load_vector(x, token * x_vectors + vector))
        for pair in range(thread, top_k, threads):
            word = types.uint64(0)
            for half in range(2):
                k = 2 * pair + half
                if k < top_k:
                    bits = weights[token * weights_stride + k]
                else:
                    bits = ids[token * ids_stride + k - top_k]
                word |= types.uint64(bits) << types.uint64(32 * half)
            wire[WORDS * (token * row_vectors + num_vectors) + pair] = word

    bits = types.CPointer(types.uint32)
    return Kernel(
        pack_rows,
        (WORD_POINTER, INT32, INT32, bits, INT32, bits, INT32, INT32, WORD_POINTER, INT32),
        threads,
        key=(threads,),
    )


def fits(x: torch.Tensor) -> bool:
    """Do the rows of x [n, H] move in whole vectors?"""
    size = x.element_size()
    return (
        x.shape[1] * size % VECTOR_BYTES == 0
        and x.stride(0) * size % VECTOR_BYTES == 0
        and x.data_ptr() % VECTOR_BYTES == 0
    )


def pack_rows(
    stream: Stream,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    wire_hidden: torch.Tensor,
    row_bytes: int,
    kernel: Kernel | None = None,
) -> None:
    """Fill the wire rows: hidden values go to `wire_hidden`, weights and ids right behind them.

    x [n, H] of any dtype, n >= 1, see `fits`; ids [n, K] int32; weights [n, K] float32; rows of all three may be
    strided. wire_hidden [n, H] of x's dtype, rows `row_bytes` apart and on boundaries of 16 bytes.
    """
    kernel = kernel or pack_kernel()
    size, top_k = x.element_size(), ids.shape[1]
    assert fits(x) and len(x) >= 1, (x.shape, x.stride())
    assert x.dtype == wire_hidden.dtype and x.shape == wire_hidden.shape, (
        x.dtype,
        wire_hidden.dtype,
        x.shape,
        wire_hidden.shape,
    )
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32, (ids.dtype, weights.dtype)
    assert ids.shape == weights.shape == (len(x), top_k), (ids.shape, weights.shape)
    assert x.stride(1) == 1 and all(t.stride(1) == 1 or top_k == 1 for t in (ids, weights))
    assert (
        wire_hidden.stride() == (row_bytes // size, 1)
        and wire_hidden.data_ptr() % VECTOR_BYTES == 0 == row_bytes % VECTOR_BYTES
    )
    assert row_bytes >= x.shape[1] * size + 8 * top_k
    kernel.launch(
        stream,
        (len(x), 1),
        x,
        x.stride(0) * size // VECTOR_BYTES,
        x.shape[1] * size // VECTOR_BYTES,
        ids,
        ids.stride(0),
        weights,
        weights.stride(0),
        top_k,
        wire_hidden,
        row_bytes // VECTOR_BYTES,
    )
