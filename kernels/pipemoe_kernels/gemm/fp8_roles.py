"""What the warpgroups of fp8.py do with one tile: fill the ring, use it up, or only keep it turning.

    shared memory:  | barriers | scales of x, by stage | experts' ends | stage 0: x tile, w tile | stage 1 | ... |
    full[s]   the producer's copies of stage s have landed      parity flips with every turn of the ring
    empty[s]  all consumer warps are done with stage s

A stage holds STEP columns of 128 rows of x and of 256 rows of w, and the 128 scales of that x. roles.py does the same
for bfloat16, where tiles may be cut; here they are always whole. Every function here is inlined into the kernel.
"""

from __future__ import annotations

from pipemoe_kernels.gemm.raster import MAX_EXPERTS
from pipemoe_kernels.gemm.ring import EMPTY_AT, GROUP_ROWS, NUM_STAGES, TILE_ROWS, X_BOXES, next_stage
from pipemoe_kernels.launch.kernel import ADDRESS, UINT32
from pipemoe_kernels.launch.tensor_map import MAP_BYTES
from pipemoe_kernels.numba_cuda import cuda
from pipemoe_kernels.ptx import fp8 as fp8
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.fp8 import STEP, WIDTH
from pipemoe_kernels.ptx.wgmma import TILE_DESCRIPTOR, accumulators

TILE_COLUMNS = 2 * WIDTH  # rows of w in a stage
X_BYTES = TILE_ROWS * STEP
HALF_BYTES = WIDTH * STEP
STAGE_BYTES = X_BYTES + 2 * HALF_BYTES
# The copy engine starts only at every fourth scale (16 bytes), so up to 3 scales of earlier rows come along.
SCALE_COLUMNS = TILE_ROWS + 4
SCALE_BYTES = 4 * SCALE_COLUMNS
SCALE_PITCH = 640  # bytes from one stage's scales to the next one's
SCALES_AT = 128
ENDS_AT = SCALES_AT + NUM_STAGES * SCALE_PITCH
RING_AT = ENDS_AT + 4 * (MAX_EXPERTS + 1) + 1023 & ~1023
SHARED_BYTES = 1024 + RING_AT + NUM_STAGES * STAGE_BYTES  # the first 1024 to align the rest


def gathering_producer():
    """x: 128 threads copy rows of the wire buffer and their scales, which follow `depth` values. w: boxes of gate and
    of up rows.
    """

    @cuda.jit(device=True, inline="always")
    def produce(
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
        first_column,
        num_columns,
    ):
        part = thread & UINT32(7)
        line = thread >> UINT32(3)
        line_at = line * UINT32(128) + ((part ^ (line & UINT32(7))) << UINT32(4))
        rows = ptx.tile_rows(tokens, row + line, end, x_stride)
        own_row = fp8.row_offset(tokens + 4 * ADDRESS(row + thread), row + thread, end, x_stride)
        scales = x + ADDRESS(steps * STEP)
        step = UINT32(0)
        while step < steps:
            full = UINT32(barriers + 8 * stage)
            x_tile = UINT32(ring + stage * STAGE_BYTES)
            ptx.barrier_wait(full + EMPTY_AT, parity)
            if thread == 0:
                ptx.barrier_expect(full, 2 * HALF_BYTES)
                ptx.load_box_3d(x_tile + X_BYTES, w_map, full, step * STEP, first_column, expert)
                ptx.load_box_3d(
                    x_tile + X_BYTES + HALF_BYTES, w_map, full, step * STEP, num_columns + first_column, expert
                )
            ptx.copy_rows(rows, x, x_tile + line_at, UINT32(step * 8) + part, 16)
            fp8.copy_scale(own_row, scales + ADDRESS(4 * step), barriers + SCALES_AT + stage * SCALE_PITCH + 4 * thread)
            ptx.commit_copies()
            # Two stages stay under way; one thread of each warp announces the stage before them.
            ptx.wait_for_copies_but_two()
            cuda.syncwarp()
            if thread & UINT32(31) == 0 and issued >= 2:
                ptx.barrier_arrive(barriers + 8 * ((stage + NUM_STAGES - 2) % NUM_STAGES))
            issued = UINT32(min(issued + 1, 2))
            stage, parity = next_stage(stage, parity)
            step = UINT32(step + 1)
        return stage, parity, issued

    return produce


def sorted_producer():
    """x: boxes of rows in sorted order and of their scales; w: boxes of its rows. One thread."""

    @cuda.jit(device=True, inline="always")
    def produce(
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
        first_column,
        num_columns,
    ):
        # The smallest box that holds the tile's rows.
        halvings = UINT32(0)
        while halvings < 3 and UINT32(end - row) <= UINT32(TILE_ROWS // 2) >> halvings:
            halvings = UINT32(halvings + 1)
        scales = x + MAP_BYTES * len(X_BOXES)
        x += MAP_BYTES * halvings
        num_bytes = UINT32(2 * HALF_BYTES + SCALE_BYTES) + (UINT32(X_BYTES) >> halvings)
        ahead = UINT32(0)
        if issued == 0:
            # The first stages' weights do not depend on the previous kernel: fetch them while it ends.
            ahead = UINT32(min(steps, UINT32(NUM_STAGES)))
            step = UINT32(0)
            while step < ahead:
                full = UINT32(barriers + 8 * step)
                ptx.barrier_expect(full, num_bytes)
                ptx.load_box_3d(ring + step * STAGE_BYTES + X_BYTES, w_map, full, step * STEP, first_column, expert)
                step = UINT32(step + 1)
            ptx.wait_for_earlier()
        step = UINT32(0)
        while step < steps:
            full = UINT32(barriers + 8 * stage)
            x_tile = UINT32(ring + stage * STAGE_BYTES)
            if step >= ahead:
                ptx.barrier_wait(full + EMPTY_AT, parity)
                ptx.barrier_expect(full, num_bytes)
                ptx.load_box_3d(x_tile + X_BYTES, w_map, full, step * STEP, first_column, expert)
            ptx.load_box_2d(x_tile, x, full, step * STEP, row)
            ptx.load_box_2d(barriers + SCALES_AT + stage * SCALE_PITCH, scales, full, row & UINT32(0xFFFFFFFC), step)
            stage, parity = next_stage(stage, parity)
            step = UINT32(step + 1)
        return stage, parity, UINT32(1)

    return produce


def consumer(gated: bool):
    """Multiply a warpgroup's 64 rows with twice 128 rows of w, and store the results.

    line: where the scale of this thread's first row is. w_scales, second_w_scales: addresses of the scales, by step, of
    the first and the second 128 rows of w.
    """
    sums = accumulators(WIDTH, has_bias=False)
    zero, store = sums.zero, sums.store

    @cuda.jit(device=True, inline="always")
    def consume(
        barriers,
        ring,
        stage,
        parity,
        steps,
        group,
        lane,
        line,
        w_scales,
        second_w_scales,
        target,
        out_row_bytes,
        rows,
        columns,
        out_scales,
    ):
        first, second, products = zero(), zero(), zero()
        step = UINT32(0)
        while step < steps:
            full = UINT32(barriers + 8 * stage)
            x_tile = UINT32(ring + stage * STAGE_BYTES)
            scale, second_scale = fp8.load_f32(w_scales), fp8.load_f32(second_w_scales)
            w_scales += 4
            second_w_scales += 4
            ptx.barrier_wait(full, parity)
            scales = UINT32(barriers + SCALES_AT + stage * SCALE_PITCH + 4 * line)
            low, high = fp8.load_shared_f32(scales), fp8.load_shared_f32(scales + 32)
            a = TILE_DESCRIPTOR | ADDRESS((x_tile + group * (GROUP_ROWS * STEP)) >> 4)
            b = TILE_DESCRIPTOR | ADDRESS((x_tile + X_BYTES) >> 4)
            products = fp8.multiply(products, a, b)
            first = fp8.promote(first, products, low * scale, high * scale)
            products = fp8.multiply(products, a, b + (HALF_BYTES >> 4))
            if lane == 0:
                ptx.barrier_arrive(full + EMPTY_AT)
            second = fp8.promote(second, products, low * second_scale, high * second_scale)
            stage, parity = next_stage(stage, parity)
            step = UINT32(step + 1)
        if gated:
            fp8.store_swiglu_e4m3(first, second, target, out_row_bytes, out_scales, lane, rows)
        else:
            store(first, target, out_row_bytes, lane, rows, columns)
            store(
                second, target + 2 * WIDTH, out_row_bytes, lane, rows, columns - WIDTH if columns > WIDTH else UINT32(0)
            )
        return stage, parity

    return consume
