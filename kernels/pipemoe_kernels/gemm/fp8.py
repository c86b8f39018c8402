"""Grouped GEMM on Hopper's tensor cores in e4m3: scales for 1 x 128 of x and 128 x 128 of w, one persistent launch.

    rows [n, H] e4m3 | scales [n, H/128]   w [E_loc, N, Kd] e4m3, scales [E_loc, N/128, Kd/128]   out [pairs, columns]
      gate_up: out = silu(x gate^T) * (x up^T) as e4m3, with scales [I/128, pitch] (a row's scales one below the other)
      down:    out = x w^T as bfloat16; x as gate_up left it

Thread blocks, ring, gather and order of tiles are those of wgmma.py. A step takes 128 columns of both operands: the
bytes and cycles of a bfloat16 step of 64. After each step the products are scaled and added to float32 sums. A consumer
has 64 x 256 sums and makes products of 64 x 128 at a time; a thread has no registers for more. While one consumer adds,
the tensor cores work for the other. A tile of gate_up gives 128 columns of out, which share one scale, so it leaves
quantised. Ideas: the format from DeepSeek-V3's report; scales beside the ring and promotion between two consumers from
DeepGEMM.
"""

from __future__ import annotations

import torch

from pipemoe_kernels.gemm.fp8_roles import (
    ENDS_AT,
    RING_AT,
    SCALE_COLUMNS,
    SHARED_BYTES,
    TILE_COLUMNS,
    consumer,
    gathering_producer,
    sorted_producer,
)
from pipemoe_kernels.gemm.raster import MAX_EXPERTS, find_tile, load_ends, next_expert
from pipemoe_kernels.gemm.ring import (
    CONSUMERS,
    EMPTY_AT,
    GROUP_ROWS,
    NUM_STAGES,
    TILE_ROWS,
    X_BOXES,
    announce_rest,
    skip_tile,
)
from pipemoe_kernels.launch.kernel import ADDRESS, UINT32, Kernel, Stream, kernel_factory
from pipemoe_kernels.launch.tensor_map import line_map, tensor_map
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.fp8 import STEP, WIDTH

THREADS = 128 * (1 + CONSUMERS)
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 56, 224
BLOCK = 128  # columns of x, and rows and columns of w, with one scale
E4M3 = torch.float8_e4m3fn


@kernel_factory
def grouped_fp8_kernel(*, gated: bool) -> Kernel:
    """gated: x is gathered from wire rows, and the result is SwiGLU of both halves of w's rows. Else x is sorted."""
    output_columns = TILE_COLUMNS // 2 if gated else TILE_COLUMNS
    full_arrivals = 5 if gated else 1  # the bulk copies' thread, and one thread of each warp that gathers
    consume = consumer(gated)
    produce = gathering_producer() if gated else sorted_producer()
    keep_registers, take_registers = ptx.keep_registers(PRODUCER_REGISTERS), ptx.take_registers(CONSUMER_REGISTERS)

    def grouped_fp8_gemm(
        x,
        x_stride,
        tokens,
        w_map,
        w_scales,
        offsets,
        num_local,
        num_columns,
        steps,
        out,
        out_row_bytes,
        out_scales,
        out_scales_pitch,
    ):
        barriers = (ptx.shared_address(cuda.shared.array(0, types.uint8)) + UINT32(1023)) & UINT32(0xFFFFFC00)
        ends = UINT32(barriers + ENDS_AT)
        ring = UINT32(barriers + RING_AT)
        thread = UINT32(cuda.threadIdx.x)
        warpgroup = ptx.of_first_lane(thread >> UINT32(7))
        if thread == 0:
            for i in range(NUM_STAGES):
                ptx.barrier_init(barriers + 8 * i, full_arrivals)
                ptx.barrier_init(barriers + EMPTY_AT + 8 * i, 4 * CONSUMERS)
            ptx.barrier_fence()
        column_tiles = UINT32(UINT32(num_columns + output_columns - 1) // UINT32(output_columns))
        if gated:
            # Now the index is complete. The down kernel relies on that when its blocks start.
            ptx.wait_for_earlier()
        ptx.launch_dependents()
        load_ends(thread, UINT32(THREADS), offsets, num_local, ends)
        num_blocks = UINT32(cuda.gridDim.x)
        tile = UINT32(cuda.blockIdx.x)
        stage = UINT32(0)
        expert = UINT32(0)
        first_tile = UINT32(0)
        begin = UINT32(0)
        if warpgroup == 0:
            keep_registers()
            parity = UINT32(1)
            issued = UINT32(0)
            if gated or thread == 0:
                while True:
                    expert, first_tile, begin, end = next_expert(
                        tile, expert, first_tile, begin, ends, num_local, column_tiles
                    )
                    if expert >= num_local:
                        break
                    row, column = find_tile(UINT32(tile - first_tile), begin, end, column_tiles)
                    stage, parity, issued = produce(
                        thread,
                        issued,
                        barriers,
                        ring,
                        stage,
                        parity,
                        steps,
                        x,
                        x_stride,
                        tokens,
                        w_map,
                        expert,
                        row,
                        end,
                        UINT32(column * output_columns),
                        num_columns,
                    )
                    tile = UINT32(tile + num_blocks)
            if gated:
                announce_rest(thread, barriers, stage, issued)
        else:
            take_registers()
            parity = UINT32(0)
            group = UINT32(warpgroup - 1)
            lane = thread & UINT32(31)
            line_of_tile = UINT32(group * GROUP_ROWS + ((thread >> UINT32(5)) & UINT32(3)) * 16 + (lane >> UINT32(2)))
            scale_rows = UINT32(num_columns // WIDTH)  # of an expert's w
            if gated:
                scale_rows = UINT32(2 * scale_rows)
            while True:
                expert, first_tile, begin, end = next_expert(
                    tile, expert, first_tile, begin, ends, num_local, column_tiles
                )
                if expert >= num_local:
                    break
                row, column = find_tile(UINT32(tile - first_tile), begin, end, column_tiles)
                if UINT32(row + group * GROUP_ROWS) >= end:
                    stage, parity = skip_tile(barriers, stage, parity, steps, UINT32(0), lane)
                else:
                    line = UINT32(row + line_of_tile)
                    first_column = UINT32(column * output_columns)
                    columns_left = UINT32(num_columns - first_column)
                    rows_left = UINT32(end - line) if line < end else UINT32(0)
                    if gated:
                        scale_line = line_of_tile
                        second_block = UINT32(scale_rows // UINT32(2))
                        target = out + ADDRESS(line) * out_row_bytes + ADDRESS(first_column)
                    else:
                        scale_line = UINT32(line_of_tile + (row & UINT32(3)))
                        # The last tile may have only 128 columns: its other half is zeros, times any scale.
                        second_block = UINT32(1) if columns_left > WIDTH else UINT32(0)
                        target = out + ADDRESS(line) * out_row_bytes + ADDRESS(first_column * 2)
                    block = UINT32(expert * scale_rows + first_column // UINT32(WIDTH))
                    scales = w_scales + 4 * (ADDRESS(block) * steps)
                    second_scales = scales + 4 * ADDRESS(second_block * steps)
                    scales_target = out_scales + 4 * (ADDRESS(column) * out_scales_pitch + ADDRESS(line))
                    stage, parity = consume(
                        barriers,
                        ring,
                        stage,
                        parity,
                        steps,
                        group,
                        lane,
                        scale_line,
                        scales,
                        second_scales,
                        target,
                        out_row_bytes,
                        rows_left,
                        columns_left,
                        scales_target,
                    )
                tile = UINT32(tile + num_blocks)

    parameters = (ADDRESS, UINT32, *[ADDRESS] * 4, *[UINT32] * 3, ADDRESS, UINT32, ADDRESS, UINT32)
    return Kernel(
        grouped_fp8_gemm,
        parameters,
        THREADS,
        shared_bytes=SHARED_BYTES,
        hopper_only=True,
        starts_early=True,
        moves_registers=True,
        key=(gated, ptx.MAX_TRIES),
    )


def weight_map(w: torch.Tensor, *, gated: bool) -> bytes:
    """The tensor map of w [E_loc, 2I, H] (gated) or [E_loc, H, I], e4m3, for gate_up_fp8 or down_fp8."""
    return tensor_map(w, WIDTH if gated else TILE_COLUMNS)


def row_maps(a: torch.Tensor, scales: torch.Tensor) -> list[bytes]:
    """The tensor maps of a [pairs, I] e4m3 and its scales [I/128, pitch] float32, for down_fp8."""
    return [*(tensor_map(a, box) for box in X_BOXES), line_map(scales, SCALE_COLUMNS)]


class PackedGateUpFp8:
    """gate_up_fp8, ready for hidden values of one layout and any number of pairs for which `a` has room."""

    def __init__(
        self,
        device_index: int,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        gate_up_map: int,
        gate_up_scales: torch.Tensor,
        offsets: torch.Tensor,
        a: torch.Tensor,
        a_scales: torch.Tensor,
        num_sms: int,
    ):
        num_pairs, intermediate = a.shape
        depth, row_bytes = hidden.shape[1], hidden.stride(0)
        assert hidden.dtype == a.dtype == E4M3 and hidden.stride(1) == 1 and a.is_contiguous()
        assert depth % BLOCK == 0 and intermediate % BLOCK == 0, (hidden.shape, a.shape)
        assert row_bytes % 16 == 0 and row_bytes >= depth + 4 * (depth // BLOCK), row_bytes
        assert tokens.dtype == offsets.dtype == torch.int32 and len(offsets) <= MAX_EXPERTS
        _check_scales(gate_up_scales, (len(offsets), 2 * intermediate // BLOCK, depth // BLOCK))
        assert a.data_ptr() % 16 == 0 and a_scales.dtype == torch.float32 and a_scales.stride(1) == 1
        assert a_scales.shape[0] == intermediate // BLOCK and a_scales.shape[1] >= num_pairs, (a_scales.shape, a.shape)
        kernel = grouped_fp8_kernel(gated=True)
        self._launch = kernel.pack(
            device_index,
            hidden,
            row_bytes // 16,
            tokens,
            gate_up_map,
            gate_up_scales,
            offsets,
            len(offsets),
            intermediate,
            depth // STEP,
            a,
            intermediate,
            a_scales,
            a_scales.stride(0),
        )
        self._x = kernel.index_of("x")
        self._sizes = len(offsets), intermediate // WIDTH, num_sms

    def __call__(self, stream: int, hidden: int, num_pairs: int) -> None:
        """Enqueue on a stream's handle, for rows at the address `hidden` that have num_pairs >= 1 pairs in all."""
        assert hidden % 16 == 0, hidden
        self._launch.values[self._x] = hidden
        self._launch(stream, _num_blocks(num_pairs, *self._sizes))


def gate_up_fp8(
    stream: Stream,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    gate_up_map: int,
    gate_up_scales: torch.Tensor,
    offsets: torch.Tensor,
    a: torch.Tensor,
    a_scales: torch.Tensor,
    num_sms: int,
) -> None:
    """a[p] = silu(gate x) * (up x), x = hidden[tokens[p]], for every place p < offsets[-1] of the sorted order.

    hidden [n, H] e4m3, rows on 16-byte boundaries, each followed by its H/128 float32 scales; tokens [pairs] int32;
    gate_up_map: address of the map of [E_loc, 2I, H]; gate_up_scales [E_loc, 2I/128, H/128] float32; offsets [E_loc]
    int32 ends; a [pairs, I] e4m3, each value to be multiplied by a_scales[column // 128, row]; a_scales [I/128, >=
    pairs] float32.
    """
    gate_up = PackedGateUpFp8(
        stream.device_index, hidden, tokens, gate_up_map, gate_up_scales, offsets, a, a_scales, num_sms
    )
    gate_up(stream.handle, hidden.data_ptr(), len(a))


class PackedDownFp8:
    """down_fp8, ready for any number of pairs for which `y` has room."""

    def __init__(
        self,
        device_index: int,
        a_maps: int,
        down_map: int,
        down_scales: torch.Tensor,
        offsets: torch.Tensor,
        y: torch.Tensor,
        num_sms: int,
        *,
        may_start_early: bool = True,
    ):
        hidden, steps = y.shape[1], down_scales.shape[2]
        assert y.dtype == torch.bfloat16 and y.is_contiguous() and y.data_ptr() % 16 == 0 and hidden % BLOCK == 0, (
            y.shape
        )
        assert offsets.dtype == torch.int32 and len(offsets) <= MAX_EXPERTS
        _check_scales(down_scales, (len(offsets), hidden // BLOCK, steps))
        self._launch = grouped_fp8_kernel(gated=False).pack(
            device_index,
            a_maps,
            0,
            offsets,
            down_map,
            down_scales,
            offsets,
            len(offsets),
            hidden,
            steps,
            y,
            2 * hidden,
            y,
            0,
            may_start_early=may_start_early,
        )
        self._sizes = len(offsets), -(-hidden // TILE_COLUMNS), num_sms

    def __call__(self, stream: int, num_pairs: int) -> None:
        """Enqueue on a stream's handle, for num_pairs >= 1 pairs."""
        self._launch(stream, _num_blocks(num_pairs, *self._sizes))


def down_fp8(
    stream: Stream,
    a_maps: int,
    down_map: int,
    down_scales: torch.Tensor,
    offsets: torch.Tensor,
    y: torch.Tensor,
    num_sms: int,
) -> None:
    """y[p] = down a[p] for every place p < offsets[-1] of the sorted order.

    a_maps: address of row_maps of a [pairs, I]; down_map: of the map of [E_loc, H, I]; down_scales [E_loc, H/128,
    I/128] float32; offsets [E_loc] int32 ends; y [pairs, H] bfloat16.
    """
    PackedDownFp8(stream.device_index, a_maps, down_map, down_scales, offsets, y, num_sms)(stream.handle, len(y))


def _check_scales(scales: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert scales.dtype == torch.float32 and scales.is_contiguous() and scales.shape == shape, (
        scales.dtype,
        scales.shape,
        shape,
    )


def _num_blocks(num_pairs: int, num_local: int, column_tiles: int, num_sms: int) -> int:
    """At most as many blocks as there can be tiles, whatever the routing."""
    return min(num_sms, (num_pairs // TILE_ROWS + min(num_local, num_pairs)) * column_tiles)
