"""Grouped GEMM on the tensor cores of sm_80 and newer: what wgmma.py computes, without Hopper's instructions.

    shared memory:  | experts' ends | stage 0: x tile, w tile | stage 1 | ... |     NUM_STAGES stages of 32 columns

    block = 8 warps; a tile of 128 rows and 256 rows of w, 64 x 64 each:      | 0 1 2 3 |
                                                                              | 4 5 6 7 |
    a slice of 128 or 64 rows of w (see raster.py), 32 x 64 or 16 x 64 each:  | 0 1 |, ...

All threads copy one stage by `cp.async` while they multiply another (gathered rows of x are found through `tokens`).
The copies of the next tile's first stages begin within a tile's last steps. Sums run over ascending k in steps of 16,
in the same order in every tile and slice. Idea: the multistage GEMM of CUTLASS.
"""

from __future__ import annotations

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.raster import MAX_EXPERTS, find_tile, load_ends, next_expert, plan_rounds, tile_of
from pipemoe_kernels.launch.kernel import ADDRESS, UINT32, Kernel, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx import mma as mma
from pipemoe_kernels.ptx.mma import NO_ROW, ROW_BYTES, STEP, warp_sums

TILE_ROWS, TILE_COLUMNS = 128, 256
WARPS = 8
THREADS = 32 * WARPS
NUM_STAGES = 4
AHEAD = NUM_STAGES - 1
X_BYTES = TILE_ROWS * ROW_BYTES
STAGE_BYTES = X_BYTES + TILE_COLUMNS * ROW_BYTES
RING_AT = 4 * (MAX_EXPERTS + 1) + 127 & ~127
SHARED_BYTES = 128 + RING_AT + NUM_STAGES * STAGE_BYTES  # the first 128 to align the rest
MAX_CUTS = 2
PART_COLUMNS = 8  # of a 16-byte part
PARTS = STEP // PART_COLUMNS
LINES = THREADS // PARTS  # rows of a stage that all threads copy at once


@cuda.jit(device=True, inline="always")
def copy_stage(
    thread,
    ring,
    stage,
    x,
    w,
    step,
    steps,
    units,
    x_0,
    x_1,
    w_0,
    w_1,
    w_2,
    w_3,
    next_x_0,
    next_x_1,
    next_w_0,
    next_w_1,
    next_w_2,
    next_w_3,
):
    """Start the copies for the step AHEAD of `step`, of this tile or the next. x_i, w_i: 16-byte units, or NO_ROW."""
    step = UINT32(step + AHEAD)
    if step >= steps:
        step = UINT32(step - steps)
        x_0, x_1, w_0, w_1, w_2, w_3 = next_x_0, next_x_1, next_w_0, next_w_1, next_w_2, next_w_3
    part = thread & UINT32(PARTS - 1)
    line = thread >> UINT32(2)
    unit = UINT32(step * PARTS + part)
    size = UINT32(16) if unit < units else UINT32(0)
    unit = unit if unit < units else UINT32(0)
    x_tile = UINT32(ring + ((stage + AHEAD) & UINT32(NUM_STAGES - 1)) * STAGE_BYTES)
    x_tile = UINT32(x_tile + line * ROW_BYTES + ((part ^ ((line >> UINT32(1)) & UINT32(3))) << UINT32(4)))
    mma.copy_part(x_tile, x + ADDRESS(16) * ADDRESS(UINT32(x_0 + unit)), size, x_0)
    mma.copy_part(x_tile + LINES * ROW_BYTES, x + ADDRESS(16) * ADDRESS(UINT32(x_1 + unit)), size, x_1)
    w_tile = UINT32(x_tile + X_BYTES)
    mma.copy_part(w_tile, w + ADDRESS(16) * ADDRESS(UINT32(w_0 + unit)), size, w_0)
    mma.copy_part(w_tile + LINES * ROW_BYTES, w + ADDRESS(16) * ADDRESS(UINT32(w_1 + unit)), size, w_1)
    mma.copy_part(w_tile + 2 * LINES * ROW_BYTES, w + ADDRESS(16) * ADDRESS(UINT32(w_2 + unit)), size, w_2)
    mma.copy_part(w_tile + 3 * LINES * ROW_BYTES, w + ADDRESS(16) * ADDRESS(UINT32(w_3 + unit)), size, w_3)
    mma.commit_copies()


def consumer(cuts: int, gated: bool, has_bias: bool, activation: str | Gating | None):
    """Multiply all steps of one tile (cuts 0), or of a slice of one, and store the results."""
    blocks = 4 >> cuts
    warp_columns = 4 >> cuts  # warps next to one another
    columns_of_warp = 32 if gated else 64  # of out
    sums = warp_sums(blocks, has_bias=has_bias, activation=activation, gated=gated)
    zero, multiply, store = sums.zero, sums.multiply, sums.store
    w_row_bytes = columns_of_warp * ROW_BYTES
    to_second = (TILE_COLUMNS // 2 >> cuts if gated else 32) * ROW_BYTES

    @cuda.jit(device=True, inline="always")
    def consume(
        thread,
        ring,
        stage,
        x,
        w,
        steps,
        units,
        x_0,
        x_1,
        w_0,
        w_1,
        w_2,
        w_3,
        next_x_0,
        next_x_1,
        next_w_0,
        next_w_1,
        next_w_2,
        next_w_3,
        row,
        end,
        first_column,
        num_columns,
        out,
        out_row_bytes,
        bias,
        bias_stride,
    ):
        warp = ptx.of_first_lane(thread >> UINT32(5))
        lane = thread & UINT32(31)
        warp_row = UINT32(UINT32(warp // UINT32(warp_columns)) * UINT32(blocks * mma.BLOCK_ROWS))
        warp_column = UINT32(warp % UINT32(warp_columns))
        x_part, w_part = mma.lane_part_x(lane), mma.lane_part_w(lane)
        works = row + warp_row < end
        acc = zero()
        for step in range(steps):
            mma.wait_for_copies_but_two()
            cuda.syncthreads()
            copy_stage(
                thread,
                ring,
                stage,
                x,
                w,
                UINT32(step),
                steps,
                units,
                x_0,
                x_1,
                w_0,
                w_1,
                w_2,
                w_3,
                next_x_0,
                next_x_1,
                next_w_0,
                next_w_1,
                next_w_2,
                next_w_3,
            )
            if works:
                x_tile = UINT32(ring + stage * STAGE_BYTES)
                x_warp = UINT32(x_tile + warp_row * ROW_BYTES)
                w_warp = UINT32(x_tile + X_BYTES + warp_column * w_row_bytes)
                acc = multiply(acc, x_warp, x_part, w_warp, w_part, UINT32(to_second))
            stage = UINT32((stage + UINT32(1)) & UINT32(NUM_STAGES - 1))
        if works:
            line = UINT32(row + warp_row + (lane >> UINT32(2)))
            column = UINT32(first_column + warp_column * columns_of_warp)
            rows_left = UINT32(end - line) if line < end else UINT32(0)
            columns_left = UINT32(num_columns - column) if column < num_columns else UINT32(0)
            target = out + ADDRESS(line) * out_row_bytes + ADDRESS(2 * column)
            own_bias = bias + ADDRESS(2 * column)
            store(acc, target, out_row_bytes, lane, rows_left, columns_left, own_bias, own_bias + bias_stride)
        return stage

    return consume


@kernel_factory
def grouped_mma_kernel(*, gated: bool, has_bias: bool = False, activation: str | Gating | None = None) -> Kernel:
    """Like wgmma.grouped_kernel: with an activation x is gathered, else it is in sorted order already."""
    gathers = activation is not None
    output_columns = TILE_COLUMNS // 2 if gated else TILE_COLUMNS
    halves = 2 if gated else 1
    consume_whole, consume_half, consume_quarter = (
        consumer(c, gated, has_bias, activation) for c in range(MAX_CUTS + 1)
    )

    @cuda.jit(device=True, inline="always")
    def x_row(tokens, row, end, x_stride):
        if row >= end:
            return UINT32(NO_ROW)
        return UINT32((ptx.load_u32(tokens + ADDRESS(4) * ADDRESS(row)) if gathers else row) * x_stride)

    @cuda.jit(device=True, inline="always")
    def w_row(line, width, first_column, num_columns, first_row, units):
        """Row `line` of a slice that has `width` rows of w, of each half."""
        half = UINT32(0)
        if gated and line >= width:
            half = UINT32(1)
            line = UINT32(line - width)
        column = UINT32(first_column + line)
        if line >= width or column >= num_columns:
            return UINT32(NO_ROW)
        return UINT32(UINT32(first_row + half * num_columns + column) * units)

    def grouped_gemm(x, x_stride, tokens, w, offsets, num_local, num_columns, depth, bias, out, out_row_bytes):
        ends = (ptx.shared_address(cuda.shared.array(0, types.uint8)) + UINT32(127)) & UINT32(0xFFFFFF80)
        ring = UINT32(ends + RING_AT)
        thread = UINT32(cuda.threadIdx.x)
        line = thread >> UINT32(2)
        column_tiles = UINT32(UINT32(num_columns + output_columns - 1) // UINT32(output_columns))
        units = UINT32(depth // UINT32(PART_COLUMNS))
        # At least as many steps as are under way at once; steps after the last real one multiply zeros.
        steps = UINT32(max(UINT32(UINT32(depth + STEP - 1) // UINT32(STEP)), UINT32(AHEAD)))
        row_tiles = load_ends(thread, UINT32(THREADS), offsets, num_local, ends)
        num_blocks = UINT32(cuda.gridDim.x)
        num_rows = ptx.load_shared_u32(ends + 4 * (num_local - 1))
        whole, rest_cuts = plan_rounds(num_rows, row_tiles, column_tiles, num_blocks, MAX_CUTS)
        turn = UINT32(cuda.blockIdx.x)
        stage = UINT32(0)
        expert, first_tile, begin = UINT32(0), UINT32(0), UINT32(0)
        row, end, first_column, cuts = UINT32(0), UINT32(0), UINT32(0), UINT32(0)
        tile_expert = UINT32(0)
        x_0, x_1, w_0, w_1 = UINT32(NO_ROW), UINT32(NO_ROW), UINT32(NO_ROW), UINT32(NO_ROW)
        w_2, w_3 = UINT32(NO_ROW), UINT32(NO_ROW)
        is_first = True
        while True:
            # The next tile: its first stages are copied at the end of the present one.
            tile, next_cuts, part = tile_of(turn, whole, rest_cuts)
            expert, first_tile, begin, next_end = next_expert(
                tile, expert, first_tile, begin, ends, num_local, column_tiles
            )
            next_x_0, next_x_1, next_w_0, next_w_1 = UINT32(NO_ROW), UINT32(NO_ROW), UINT32(NO_ROW), UINT32(NO_ROW)
            next_w_2, next_w_3 = UINT32(NO_ROW), UINT32(NO_ROW)
            next_row, next_column = UINT32(0), UINT32(0)
            if expert < num_local:
                next_row, column = find_tile(UINT32(tile - first_tile), begin, next_end, column_tiles)
                width = UINT32(output_columns) >> next_cuts
                next_column = UINT32(column * output_columns + part * width)
                next_x_0 = x_row(tokens, UINT32(next_row + line), next_end, x_stride)
                next_x_1 = x_row(tokens, UINT32(next_row + line + LINES), next_end, x_stride)
                first_row = UINT32(expert * (halves * num_columns))
                next_w_0 = w_row(line, width, next_column, num_columns, first_row, units)
                next_w_1 = w_row(UINT32(line + LINES), width, next_column, num_columns, first_row, units)
                next_w_2 = w_row(UINT32(line + 2 * LINES), width, next_column, num_columns, first_row, units)
                next_w_3 = w_row(UINT32(line + 3 * LINES), width, next_column, num_columns, first_row, units)
            if is_first:
                # There is no present tile: make the copies that its last steps would make.
                for i in range(AHEAD):
                    copy_stage(
                        thread,
                        ring,
                        UINT32(i - AHEAD),
                        x,
                        w,
                        UINT32(steps - AHEAD + i),
                        steps,
                        units,
                        x_0,
                        x_1,
                        w_0,
                        w_1,
                        w_2,
                        w_3,
                        next_x_0,
                        next_x_1,
                        next_w_0,
                        next_w_1,
                        next_w_2,
                        next_w_3,
                    )
                is_first = False
            else:
                own_bias = bias + ADDRESS(2) * ADDRESS(tile_expert) * ADDRESS(UINT32(halves * num_columns))
                bias_stride = ADDRESS(2 * num_columns)
                if cuts == 0:
                    stage = consume_whole(
                        thread,
                        ring,
                        stage,
                        x,
                        w,
                        steps,
                        units,
                        x_0,
                        x_1,
                        w_0,
                        w_1,
                        w_2,
                        w_3,
                        next_x_0,
                        next_x_1,
                        next_w_0,
                        next_w_1,
                        next_w_2,
                        next_w_3,
                        row,
                        end,
                        first_column,
                        num_columns,
                        out,
                        out_row_bytes,
                        own_bias,
                        bias_stride,
                    )
                elif cuts == 1:
                    stage = consume_half(
                        thread,
                        ring,
                        stage,
                        x,
                        w,
                        steps,
                        units,
                        x_0,
                        x_1,
                        w_0,
                        w_1,
                        w_2,
                        w_3,
                        next_x_0,
                        next_x_1,
                        next_w_0,
                        next_w_1,
                        next_w_2,
                        next_w_3,
                        row,
                        end,
                        first_column,
                        num_columns,
                        out,
                        out_row_bytes,
                        own_bias,
                        bias_stride,
                    )
                else:
                    stage = consume_quarter(
                        thread,
                        ring,
                        stage,
                        x,
                        w,
                        steps,
                        units,
                        x_0,
                        x_1,
                        w_0,
                        w_1,
                        w_2,
                        w_3,
                        next_x_0,
                        next_x_1,
                        next_w_0,
                        next_w_1,
                        next_w_2,
                        next_w_3,
                        row,
                        end,
                        first_column,
                        num_columns,
                        out,
                        out_row_bytes,
                        own_bias,
                        bias_stride,
                    )
            if expert >= num_local:
                break
            x_0, x_1, w_0, w_1, w_2, w_3 = next_x_0, next_x_1, next_w_0, next_w_1, next_w_2, next_w_3
            row, end, first_column, cuts, tile_expert = next_row, next_end, next_column, next_cuts, expert
            turn = UINT32(turn + num_blocks)

    parameters = (ADDRESS, UINT32, ADDRESS, ADDRESS, ADDRESS, UINT32, UINT32, UINT32, ADDRESS, ADDRESS, UINT32)
    return Kernel(
        grouped_gemm, parameters, THREADS, shared_bytes=SHARED_BYTES, key=("mma", gated, has_bias, activation)
    )
