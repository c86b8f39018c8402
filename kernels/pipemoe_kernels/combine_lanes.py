"""Combine of bfloat16 expert results, 16 bytes at a time: the same sums as combine.py, where the rows allow it.

One block per token. A thread has up to MAX_PARTS parts of the row, and their loads overlap.
"""

from __future__ import annotations

import torch

from pipemoe_kernels.launch.kernel import ADDRESS, INT32, Kernel, Stream, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx.hopper import wait_for_earlier
from pipemoe_kernels.ptx.lanes import PART_BYTES, WIDTH, row_sum

MAX_PARTS = 4


@kernel_factory
def combine_lanes_kernel(
    out_dtype: torch.dtype,
    has_bias: bool,
    top_k: int,
    hidden: int,
    on_hopper: bool = True,
) -> Kernel:
    size = out_dtype.itemsize
    row_bytes = 2 * hidden
    parts = hidden // WIDTH
    threads = min(1024, -(-parts // MAX_PARTS // 32) * 32)
    num_parts = min(MAX_PARTS, -(-parts // threads))
    stride = PART_BYTES * threads
    find, add_up, store = row_sum(top_k, has_bias, out_dtype, num_parts, stride)
    # 4 parts of 8 sums and their loads take about 64 registers, twice that for float64.
    blocks = max(1, 65536 // (threads * (128 if size == 8 or has_bias else 72)))

    def combine_lanes(y, positions, ids, ids_stride, first_expert, weights, weights_stride, bias, out, out_stride):
        if on_hopper:
            wait_for_earlier()
        token = types.int64(cuda.blockIdx.x)
        of_token = types.uint64(4 * top_k * token)
        weights += types.uint64(4 * token * weights_stride)
        rows = find(positions + of_token, weights, ids + types.uint64(4 * token * ids_stride))
        row = out + types.uint64(token * out_stride * size)
        for column in range(PART_BYTES * cuda.threadIdx.x, row_bytes, num_parts * stride):
            sums = add_up(rows, y, row_bytes, bias, first_expert, column, row_bytes)
            store(row + types.uint64(column * size // 2), sums, column, row_bytes)

    parameters = (ADDRESS, ADDRESS, ADDRESS, INT32, INT32, ADDRESS, INT32, ADDRESS, ADDRESS, INT32)
    return Kernel(
        combine_lanes,
        parameters,
        threads,
        hopper_only=on_hopper,
        starts_early=on_hopper,
        blocks_per_sm=blocks,
        key=(out_dtype, has_bias, top_k, hidden, on_hopper),
    )


def fits(hidden: int, out: torch.Tensor) -> bool:
    """Whether rows of `hidden` columns allow 16-byte accesses, in y and in `out`."""
    size = out.element_size()
    aligned = out.data_ptr() % 16 == 0 and out.stride(0) * size % 16 == 0
    return hidden % WIDTH == 0 and (aligned or len(out) == 0)


class PackedCombine:
    """combine_lanes, ready for ids, weights and an `out` of one layout, and for as many rows as `positions` has."""

    def __init__(
        self,
        device_index: int,
        y: torch.Tensor,
        positions: torch.Tensor,
        ids: torch.Tensor,
        first_expert: int,
        weights: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        on_hopper: bool = True,
        may_start_early: bool = True,
    ):
        hidden, top_k = out.shape[1], positions.shape[1]
        assert y.dtype == torch.bfloat16 and y.is_contiguous() and y.shape[1] == hidden, (y.dtype, y.shape)
        assert fits(hidden, out) and out.stride(1) == 1 and y.data_ptr() % 16 == 0
        assert positions.dtype == ids.dtype == torch.int32 and positions.is_contiguous()
        assert ids.shape == weights.shape == (len(out), top_k) and len(out) <= len(positions)
        assert weights.dtype == torch.float32 and (top_k == 1 or ids.stride(1) == weights.stride(1) == 1)
        assert bias is None or (bias.dtype == y.dtype and bias.shape[1] == hidden and bias.is_contiguous())
        assert bias is None or bias.data_ptr() % 16 == 0
        kernel = combine_lanes_kernel(out.dtype, bias is not None, top_k, hidden, on_hopper)
        rows = (y, positions, ids, ids.stride(0), first_expert, weights, weights.stride(0))
        self._launch = kernel.pack(
            device_index, *rows, y if bias is None else bias, out, out.stride(0), may_start_early=may_start_early
        )
        self._ids, self._weights, self._out = map(kernel.index_of, ("ids", "weights", "out"))

    def __call__(self, stream: int, ids: int, weights: int, out: int, num_rows: int) -> None:
        """Enqueue on a stream's handle, for num_rows >= 1 rows with ids, weights and out at these addresses."""
        values = self._launch.values
        values[self._ids], values[self._weights], values[self._out] = ids, weights, out
        self._launch(stream, num_rows)


def combine_lanes(
    stream: Stream,
    y: torch.Tensor,
    positions: torch.Tensor,
    ids: torch.Tensor,
    first_expert: int,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    on_hopper: bool = True,
    may_start_early: bool = True,
) -> None:
    """combine.combine_rows for a contiguous bfloat16 y and an `out` that `fits`."""
    how = {"on_hopper": on_hopper, "may_start_early": may_start_early}
    combine = PackedCombine(stream.device_index, y, positions, ids, first_expert, weights, bias, out, **how)
    combine(stream.handle, ids.data_ptr(), weights.data_ptr(), out.data_ptr(), len(out))
