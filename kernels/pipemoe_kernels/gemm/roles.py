"""What the warpgroups of wgmma.py do with one tile: fill the ring, use it up, or only keep it turning.

    shared memory:  | barriers | experts' ends | stage 0: x tile, w tile | stage 1 | ... |       NUM_STAGES stages
    full[s]   the producer's copies of stage s have landed      parity flips with every turn of the ring
    empty[s]  all consumer warps are done with stage s

A slice of a tile (see raster.py) needs less of a stage's w tile, and may have few rows. Then a stage holds 2 **
together steps of k. Each gets an equal share of the stage: its slice of w, and the rest for rows of x.

    whole tile   | x: 128 rows, one step     | w: 256 rows, one step                       |
    slice        | x: 32 rows | 32 | 32 | 32 | w: 64 rows | 64 rows | 64 rows | 64 rows     |   together = 2

The blocks of a pair have the same stages at the same time, each with its own rows of x. w's tile comes in two halves;
each block fetches one of them, for both. A stage is filled again when both have used it up. Rows that a block does not
have are not fetched.

Every function here is inlined into the kernel.
"""

from __future__ import annotations

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.ring import EMPTY_AT, GROUP_ROWS, NUM_STAGES, next_stage, release
from pipemoe_kernels.gemm.tile_shape import ROWS_128, STEP_BYTES, TILE_COLUMNS, W_BYTES, TileShape
from pipemoe_kernels.launch.kernel import ADDRESS, UINT32
from pipemoe_kernels.launch.tensor_map import MAP_BYTES
from pipemoe_kernels.numba_cuda import cuda
from pipemoe_kernels.ptx import cluster as ptx_cluster
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.wgmma import STEP, TILE_DESCRIPTOR, accumulators

GROUP_BYTES = GROUP_ROWS * STEP * 2
PART_COLUMNS = 8  # of a 16-byte part


@cuda.jit(device=True, inline="always")
def x_step_bytes(stage_bytes, w_bytes, together):
    """Bytes from one step's rows of x to the next one's in a stage; w_bytes: of a step. All of w stands behind all of
    x.
    """
    return UINT32((UINT32(stage_bytes) >> together) - w_bytes)


def gathering_producer(gated: bool, *, shape: TileShape = ROWS_128):
    """x: 128 threads copy rows of the wire buffer. w: boxes of gate rows and of up rows, or of both halves of its
    rows.
    """
    stage_bytes, is_pair = shape.stage_bytes, shape.blocks == 2
    rows_of_thread = ptx.rows_of_thread(shape.block_rows // 16)

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
        depth,
        cuts,
        together,
    ):
        part = thread & UINT32(7)
        line = thread >> UINT32(3)
        lane = thread & UINT32(31)
        line_at = line * UINT32(128) + ((part ^ (line & UINT32(7))) << UINT32(4))
        rows = rows_of_thread(tokens, row + line, end, x_stride)
        w_bytes = UINT32(W_BYTES) >> cuts
        half_bytes = w_bytes >> UINT32(1)
        x_bytes = x_step_bytes(stage_bytes, w_bytes, together)
        w_at = UINT32(x_bytes << together)
        to_second = UINT32(num_columns) if gated else UINT32(TILE_COLUMNS // 2) >> cuts
        w_map += MAP_BYTES * cuts
        step = UINT32(0)
        while step < steps:
            full = UINT32(barriers + 8 * stage)
            x_tile = UINT32(ring + stage * stage_bytes)
            count = UINT32(min(UINT32(1) << together, UINT32(steps - step)))
            ptx.barrier_wait(full + EMPTY_AT, parity)
            if thread == 0:
                ptx.barrier_expect(full, 2 * half_bytes * count)
                for i in range(count):
                    gate = UINT32(x_tile + w_at + i * w_bytes)
                    if is_pair:
                        half = ptx_cluster.rank()
                        w_row = UINT32(first_column + half * to_second)
                        ptx_cluster.load_box_3d_to_both(
                            gate + half * half_bytes, w_map, full, (step + i) * STEP, w_row, expert
                        )
                    else:
                        ptx.load_box_3d(gate, w_map, full, (step + i) * STEP, first_column, expert)
                        ptx.load_box_3d(
                            gate + half_bytes, w_map, full, (step + i) * STEP, first_column + to_second, expert
                        )
            for i in range(count):
                from_part = UINT32((step + i) * (STEP // PART_COLUMNS)) + part
                size = UINT32(16) if from_part * PART_COLUMNS < depth else UINT32(0)
                shared = UINT32(x_tile + i * x_bytes + line_at)
                ptx.copy_rows(rows, x, shared, from_part if size else part, size)
            ptx.commit_copies()
            # Two stages stay under way; one thread of each warp announces the stage before them.
            ptx.wait_for_copies_but_two()
            cuda.syncwarp()
            if lane == 0 and issued >= 2:
                ptx.barrier_arrive(barriers + 8 * ((stage + NUM_STAGES - 2) % NUM_STAGES))
            issued = UINT32(min(issued + 1, 2))
            stage, parity = next_stage(stage, parity)
            step = UINT32(step + count)
        return stage, parity, issued

    return produce


def sorted_producer(*, shape: TileShape = ROWS_128):
    """x: boxes of rows in sorted order. w: boxes of its rows. One thread."""
    stage_bytes, is_pair = shape.stage_bytes, shape.blocks == 2
    tile_bytes, first_half, num_boxes = shape.x_bytes, shape.x_boxes[1], len(shape.x_boxes)

    @cuda.jit(device=True, inline="always")
    def load_w(w_tile, w_bytes, w_map, full, step, count, w_row, expert):
        for i in range(count):
            shared = UINT32(w_tile + i * w_bytes)
            if is_pair:
                half = ptx_cluster.rank()
                half_bytes = w_bytes >> UINT32(1)
                half_row = UINT32(w_row + half * (half_bytes // STEP_BYTES))
                half_map = w_map + MAP_BYTES  # the box of half as many rows
                ptx_cluster.load_box_3d_to_both(
                    shared + half * half_bytes, half_map, full, (step + i) * STEP, half_row, expert
                )
            else:
                ptx.load_box_3d(shared, w_map, full, (step + i) * STEP, w_row, expert)

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
        depth,
        cuts,
        together,
    ):
        w_map += MAP_BYTES * cuts
        # The smallest box that holds the tile's rows; none if the other block of the pair has them all.
        num_rows = UINT32(end - row) if row < end else UINT32(0)
        box = UINT32(0)
        box_bytes = UINT32(tile_bytes)
        half = UINT32(first_half)
        while box < num_boxes - 1 and num_rows <= half:
            box = UINT32(box + 1)
            box_bytes = UINT32(half * STEP_BYTES)
            half = UINT32(half >> UINT32(1))
        if num_rows == UINT32(0):
            box_bytes = UINT32(0)
        x += MAP_BYTES * box
        w_bytes = UINT32(W_BYTES) >> cuts
        x_bytes = x_step_bytes(stage_bytes, w_bytes, together)
        w_at = UINT32(x_bytes << together)
        bulk_bytes = UINT32(w_bytes + box_bytes)
        most = UINT32(1) << together
        ahead = UINT32(0)
        if issued == 0:
            # The first stages' weights do not depend on the previous kernel: fetch them while it ends.
            ahead = UINT32(min(steps, UINT32(NUM_STAGES) << together))
            step = UINT32(0)
            while step < ahead:
                count = UINT32(min(most, UINT32(steps - step)))
                full = UINT32(barriers + 8 * (step >> together))
                w_tile = UINT32(ring + (step >> together) * stage_bytes + w_at)
                ptx.barrier_expect(full, bulk_bytes * count)
                load_w(w_tile, w_bytes, w_map, full, step, count, first_column, expert)
                step = UINT32(step + count)
            ptx.wait_for_earlier()
        step = UINT32(0)
        while step < steps:
            count = UINT32(min(most, UINT32(steps - step)))
            full = UINT32(barriers + 8 * stage)
            x_tile = UINT32(ring + stage * stage_bytes)
            if step >= ahead:
                ptx.barrier_wait(full + EMPTY_AT, parity)
                ptx.barrier_expect(full, bulk_bytes * count)
                load_w(UINT32(x_tile + w_at), w_bytes, w_map, full, step, count, first_column, expert)
            for i in range(count if num_rows > UINT32(0) else UINT32(0)):
                ptx.load_box_2d(x_tile + i * x_bytes, x, full, (step + i) * STEP, row)
            stage, parity = next_stage(stage, parity)
            step = UINT32(step + count)
        return stage, parity, UINT32(1)

    return produce


def consumer(width: int, gated: bool, has_bias: bool, activation: str | Gating | None, *, shape: TileShape = ROWS_128):
    """Multiply a warpgroup's 64 rows with `width` rows of w, and store the results."""
    sums = accumulators(width, has_bias=has_bias, activation=activation, gated=gated, max_width=shape.product_columns)
    zero, multiply, wait_all, wait_but_one = sums.zero, sums.multiply, sums.wait_all, sums.wait_but_one
    store, store_activated = sums.store, sums.store_activated
    activates = activation is not None
    is_slice = width < TILE_COLUMNS
    stage_bytes, w_bytes, blocks = shape.stage_bytes, width * STEP * 2, UINT32(shape.blocks)

    @cuda.jit(device=True, inline="always")
    def consume(
        barriers,
        ring,
        stage,
        parity,
        steps,
        together,
        group,
        lane,
        target,
        out_row_bytes,
        rows,
        columns,
        gate_bias,
        up_bias,
    ):
        acc = zero()
        x_bytes = UINT32(stage_bytes - w_bytes)
        if is_slice:
            x_bytes = x_step_bytes(stage_bytes, UINT32(w_bytes), together)
        w_at = UINT32(x_bytes << together) if is_slice else x_bytes
        done = UINT32(0)
        step = UINT32(0)
        while step < steps:
            full = UINT32(barriers + 8 * stage)
            x_tile = UINT32(ring + stage * stage_bytes)
            ptx.barrier_wait(full, parity)
            x_group = x_tile + group * GROUP_BYTES
            count = UINT32(min(UINT32(1) << together, UINT32(steps - step))) if is_slice else UINT32(1)
            for i in range(count):
                a = TILE_DESCRIPTOR | ADDRESS((x_group + i * x_bytes) >> 4)
                b = TILE_DESCRIPTOR | ADDRESS((x_tile + w_at + i * w_bytes) >> 4)
                acc = multiply(acc, a, b, step + i)
                acc = wait_but_one(acc)
                if i == 0 and step > 0 and lane == 0:
                    release(done, blocks)
            done = UINT32(full + EMPTY_AT)
            stage, parity = next_stage(stage, parity)
            step = UINT32(step + count)
        acc = wait_all(acc)
        if lane == 0:
            release(done, blocks)
        if activates:
            store_activated(acc, target, out_row_bytes, lane, rows, columns, gate_bias, up_bias)
        else:
            store(acc, target, out_row_bytes, lane, rows, columns)
        return stage, parity

    return consume
