"""Products of few rows, where all that counts is how early the weights are asked for and how many bytes are under way.

    x [T, Kd] -> out [T, N] (+)= x w^T       w [N, Kd], T <= 16

A block has 16 rows of w and a warp for each 256 of its columns. Every thread asks for all its weights at once, 256
bytes, before it waits for the kernel before, which makes x: three blocks of 64 KB fit a multiprocessor. The warps' sums
are added in the order of the columns.
"""

from __future__ import annotations

import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.launch.kernel import ADDRESS, INT32, UINT32, Kernel, Stream, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.few import ROWS, SLICE, STAGED_BYTES, STEPS, copy_16, few_products, wait_for_copies

MOST_ROWS = 16
MOST_WARPS = 24
ALIGNMENT = 16


@kernel_factory
def few_rows_kernel(dtype: torch.dtype, out_dtype: torch.dtype, depth: int, wide: bool, adds: bool) -> Kernel:
    """wide: for up to 16 rows of x, else 8. adds: to what `out` holds."""
    warps = depth // SLICE
    threads = 32 * warps
    num_x = 2 if wide else 1
    products = few_products(threads, num_x, dtype == torch.float16)
    element = ELEMENTS[out_dtype]
    load, store = element.load, element.store
    num_values = 4 * num_x
    num_sums, num_partial = 8 * ROWS * num_x, 32 * warps * num_values

    def few_rows(x, x_row_bytes, num_rows, w, w_row_bytes, out, out_stride):
        partial = cuda.shared.array(num_partial, types.float32)
        base = ptx.shared_address(cuda.shared.array(0, types.uint8))
        thread = UINT32(cuda.threadIdx.x)
        lane, warp = thread & UINT32(31), thread >> UINT32(5)
        group, column = lane >> UINT32(2), UINT32(warp * UINT32(SLICE) + (lane & UINT32(3)) * UINT32(8))
        first = UINT32(cuda.blockIdx.x) * UINT32(ROWS)
        stage = ((base + UINT32(ALIGNMENT - 1)) & UINT32(0xFFFFFFFF - (ALIGNMENT - 1))) + thread * UINT32(16)
        source = w + ADDRESS(first + group) * ADDRESS(w_row_bytes) + ADDRESS(2) * ADDRESS(column)
        after = ADDRESS(8) * ADDRESS(w_row_bytes)
        for s in range(STEPS):
            target = UINT32(stage + UINT32(s * 32 * threads))
            copy_16(target, source + ADDRESS(64 * s))
            copy_16(UINT32(target + UINT32(16 * threads)), source + ADDRESS(64 * s) + after)
        ptx.launch_dependents()
        ptx.wait_for_earlier()
        wait_for_copies()
        exists = UINT32(0)
        if group < num_rows:
            exists = UINT32(1)
        if wide and group + UINT32(8) < num_rows:
            exists = UINT32(exists | UINT32(2))
        row = x + ADDRESS(group) * ADDRESS(x_row_bytes) + ADDRESS(2) * ADDRESS(column)
        sums = products(stage, row, exists, ADDRESS(8) * ADDRESS(x_row_bytes))
        for i in range(num_values):
            partial[(warp * num_values + i) * 32 + lane] = sums[i]
        cuda.syncthreads()
        for number in range(thread, num_sums, threads):
            line, token = number % ROWS, number // ROWS
            if token < num_rows:
                value = 4 * (token // 8) + 2 * (line // 8) + token % 2
                of_lane = 4 * (line % 8) + token % 8 // 2
                total = types.float32(0)
                for i in range(warps):
                    total += partial[(i * num_values + value) * 32 + of_lane]
                place = types.int64(token) * out_stride + types.int64(first) + line
                if adds:
                    total += load(out, place)
                store(out, place, total)

    return Kernel(
        few_rows,
        (ADDRESS, UINT32, UINT32, ADDRESS, UINT32, element.pointer, INT32),
        threads,
        shared_bytes=STAGED_BYTES * threads + ALIGNMENT,
        hopper_only=True,
        starts_early=True,
        blocks_per_sm=max(1, (16 if wide else MOST_WARPS) // warps),
        key=(dtype, out_dtype, depth, wide, adds),
    )


def fits(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Does few_rows serve these?"""
    num_columns, depth = w.shape
    aligned = x.data_ptr() % 16 == w.data_ptr() % 16 == 0 and (x.stride(0) * 2) % 16 == 0
    return (
        0 < len(x) <= MOST_ROWS
        and num_columns % ROWS == 0
        and depth % SLICE == 0
        and depth // SLICE <= MOST_WARPS
        and x.dtype == w.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and (x.stride(1), w.stride(1)) == (1, 1)
        and aligned
    )


def few_rows(stream: Stream, x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, *, adds: bool = False) -> None:
    """out [T, N] = x [T, Kd] w [N, Kd]^T, or that is added to out; see `fits`. x and w of one 16-bit dtype; out of any
    float dtype, with adjacent columns.
    """
    assert fits(x, w) and out.shape == (len(x), len(w)) and out.stride(1) == 1, (x.shape, w.shape, out.shape)
    kernel = few_rows_kernel(x.dtype, out.dtype, w.shape[1], len(x) > 8, adds)
    places = x, 2 * x.stride(0), len(x), w, 2 * w.stride(0), out, out.stride(0)
    kernel.launch(stream, (len(w) // ROWS, 1), *places)
