"""Grouped GEMM without tensor cores: float32 sums for float32 weights, and for devices that grouped_mm does not serve.

    x [pairs, Kd] sorted by expert      w [E_loc, N, Kd]          out [pairs, N]
    | rows of expert 0 |  tile 0                                  out[i] = w[expert of i] @ x[i]
    |                  |  tile 1        one tile never crosses
    | rows of expert 1 |  tile 2        from one expert into
    | ...              |                the next

The grid covers the most tiles that any routing can give. A block walks the offsets to find its tile, and leaves if
there is none. Each sum runs over ascending k with fused multiply-adds, so a row's bits depend on neither its neighbours
nor its place.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.launch.kernel import INT32, INT32_POINTER, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda, types

ZERO = np.float32(0.0)
DEPTH = 16  # columns of x and of w that are in shared memory at a time
EACH = 4  # a thread computes EACH x EACH results
NUM_SUMS = EACH * EACH


@cache
def grouped_simt_kernel(dtype: torch.dtype, side: int = 16) -> Kernel:
    """side: threads along each edge of a tile; a tile has side * EACH rows and columns."""
    element = ELEMENTS[dtype]
    load, store = element.load, element.store
    edge = side * EACH
    threads = side * side
    pitch = edge + 1  # keeps the transposing stores off one shared-memory bank
    tile_size = DEPTH * pitch
    items = edge * DEPTH // threads

    def grouped_gemm(x, x_stride, w, offsets, num_local, num_columns, depth, out):
        tile = cuda.blockIdx.x
        begin = 0
        first_row = -1
        end = 0
        expert = 0
        for e in range(num_local):
            if first_row < 0:
                end = offsets[e]
                tiles = (end - begin + edge - 1) // edge
                if tile < tiles:
                    first_row = begin + tile * edge
                    expert = e
                tile -= tiles
                begin = end
        if first_row < 0:
            return
        first_column = cuda.blockIdx.y * edge
        x_tile = cuda.shared.array(tile_size, types.float32)
        w_tile = cuda.shared.array(tile_size, types.float32)
        sums = cuda.local.array(NUM_SUMS, types.float32)
        for i in range(NUM_SUMS):
            sums[i] = ZERO
        thread = cuda.threadIdx.x
        row_lane = thread // side
        column_lane = thread % side
        for start in range(0, depth, DEPTH):
            for i in range(items):
                item = thread + i * threads
                line = item // DEPTH
                k = item % DEPTH
                x_value = ZERO
                w_value = ZERO
                if start + k < depth:
                    if first_row + line < end:
                        x_value = load(x, (first_row + line) * x_stride + start + k)
                    if first_column + line < num_columns:
                        w_value = load(w, (expert * num_columns + first_column + line) * depth + start + k)
                x_tile[k * pitch + line] = x_value
                w_tile[k * pitch + line] = w_value
            cuda.syncthreads()
            for k in range(DEPTH):
                for i in range(EACH):
                    for j in range(EACH):
                        sums[i * EACH + j] += (
                            x_tile[k * pitch + i * side + row_lane] * w_tile[k * pitch + j * side + column_lane]
                        )
            cuda.syncthreads()
        for i in range(EACH):
            row = first_row + i * side + row_lane
            if row < end:
                for j in range(EACH):
                    column = first_column + j * side + column_lane
                    if column < num_columns:
                        store(out, row * num_columns + column, sums[i * EACH + j])

    pointer = element.pointer
    return Kernel(grouped_gemm, (pointer, INT32, pointer, INT32_POINTER, INT32, INT32, INT32, pointer), threads)


def grouped_gemm(
    stream: Stream,
    x: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor,
    out: torch.Tensor,
    kernel: Kernel | None = None,
    side: int = 16,
) -> None:
    """out[i] = w[e] @ x[i] for the rows i of each expert e; rows from offsets[-1] on are neither read nor written.

    x [pairs, Kd] rows strided, w [E_loc, N, Kd], offsets [E_loc] int32 ends, out [pairs, N]; one dtype, float32 sums.
    """
    kernel = kernel or grouped_simt_kernel(x.dtype, side)
    num_pairs, depth = x.shape
    num_local, num_columns, _ = w.shape
    edge = side * EACH
    assert x.dtype == w.dtype == out.dtype, (x.dtype, w.dtype, out.dtype)
    assert w.shape[2] == depth and w.is_contiguous() and (x.stride(1) == 1 or depth == 1)
    assert out.shape == (num_pairs, num_columns) and out.is_contiguous()
    assert offsets.dtype == torch.int32 and offsets.is_contiguous() and len(offsets) == num_local
    # Each expert may end in a partial tile; there are no more of those than pairs.
    tiles = num_pairs // edge + min(num_local, num_pairs)
    grid = (tiles, -(-num_columns // edge))
    assert grid[1] <= 65535, grid
    kernel.launch(stream, grid, x, x.stride(0), w, offsets, num_local, num_columns, depth, out)
