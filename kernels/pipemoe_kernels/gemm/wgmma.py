"""Grouped GEMM on Hopper's tensor cores: bfloat16 in and out, float32 sums, one persistent launch over all experts.

    rows [n, H] --- tokens ---> x (gathered)         w [E_loc, N, Kd]            out [pairs, columns]
    | x_0 |         1 0 1 0     | x_1 | expert 0     | gate 0 | up 0 |  gate_up: out = silu(x gate^T) * (x up^T)
    | x_1 |                     | x_0 | expert 0     | gate 1 | up 1 |  down:    out = x w^T
                                | x_1 | expert 1                        (or another activation; without gate: of x w^T)

    block = warpgroups:   producer   fills a ring of stages in shared memory with tiles of x and w: x by gathering
                                     copies through `tokens` (gate_up) or by the bulk copy engine (down), w by the
                                     engine
                          consumers  each multiplies 64 of the tile's rows with all its columns, and writes the results

A tile never crosses from one expert into the next. A warpgroup multiplies nothing if its 64 rows all lie after its
expert's end. With B blocks, each takes every B-th tile (a pair of blocks, see tile_shape.py, counts as one and halves
the tile's rows); the order keeps neighbours on the same weights (raster.py). All sums run over ascending k in steps of
16, whatever the tile: a row's bits depend on the row alone.

Ideas: warp specialisation and the ring from CUTLASS, the
gather inside the GEMM from SonicMoE, the raster from Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.raster import (
    find_tile,
    load_ends,
    next_expert,
    plan_rounds,
    steps_in_stage,
    tile_of,
)
from pipemoe_kernels.gemm.ring import EMPTY_AT, GROUP_ROWS, NUM_STAGES, announce_rest, skip_tile
from pipemoe_kernels.gemm.roles import consumer, gathering_producer, sorted_producer
from pipemoe_kernels.gemm.tile_shape import ALIGNMENT, ENDS_AT, RING_AT, ROWS_128, TILE_COLUMNS, TileShape
from pipemoe_kernels.launch.kernel import ADDRESS, UINT32, Kernel, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import cluster as ptx_cluster
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.wgmma import STEP


@dataclass(frozen=True)
class GroupedKernel:
    """One launchable form. output_columns: columns of out that a whole tile gives. A tile has up to 2 ** max_cuts
    slices.

    w_boxes: rows of the boxes of w's tensor maps, in the maps' order at w_map (whole tiles first); equal for all
    shapes.
    """

    kernel: Kernel
    output_columns: int
    max_cuts: int
    w_boxes: tuple[int, ...]
    gated: bool
    shape: TileShape = ROWS_128

    def num_blocks(self, num_local: int, num_columns: int, num_sms: int) -> Callable[[int], int]:
        """For a number of pairs: at most as many blocks as there can be slices of tiles, whatever the routing."""
        slices = -(-num_columns // self.output_columns) << self.max_cuts
        tile_rows, blocks = self.shape.rows, self.shape.blocks
        most = max(1, num_sms // blocks)
        return lambda num_pairs: blocks * min(most, (num_pairs // tile_rows + min(num_local, num_pairs)) * slices)


@kernel_factory
def grouped_kernel(
    *, gated: bool, has_bias: bool = False, activation: str | Gating | None = None, shape: TileShape = ROWS_128
) -> GroupedKernel:
    """With an activation x is gathered; the result is activation(x w^T), or if gated, activation(left half) * right
    half.

    activation: a name of ptx.activation.ACTIVATIONS. None: "silu" if gated, else x is in sorted order already, and no
    activation follows.
    """
    if gated and activation is None:
        activation = "silu"
    gathers = activation is not None
    output_columns = TILE_COLUMNS // 2 if gated else TILE_COLUMNS
    max_cuts = 2 if gathers else 3  # a slice gives at least 32 columns of out
    full_arrivals = 5 if gathers else 1  # the bulk copies' thread, and one thread of each warp that gathers
    consume_whole, consume_half, consume_quarter = (
        consumer(TILE_COLUMNS >> c, gated, has_bias, activation, shape=shape) for c in range(3)
    )
    # Where there are no eighths, this is a quarter again.
    consume_eighth = consumer(TILE_COLUMNS >> max_cuts, gated, has_bias, activation, shape=shape)
    produce = gathering_producer(gated, shape=shape) if gathers else sorted_producer(shape=shape)
    w_rows_of_column = 2 if gated else 1
    keep_registers, take_registers = (
        ptx.keep_registers(shape.producer_registers),
        ptx.take_registers(shape.consumer_registers),
    )
    threads, tile_rows, block_rows, consumer_warps = (
        shape.threads,
        UINT32(shape.rows),
        UINT32(shape.block_rows),
        4 * shape.consumers,
    )
    blocks, is_pair = UINT32(shape.blocks), shape.blocks == 2

    def grouped_gemm(x, x_stride, tokens, w_map, offsets, num_local, num_columns, depth, bias, out, out_row_bytes):
        array = ptx.shared_address(cuda.shared.array(0, types.uint8, ALIGNMENT))
        barriers = (array + UINT32(ALIGNMENT - 1)) & UINT32(0xFFFFFFFF - (ALIGNMENT - 1))
        ends = UINT32(barriers + ENDS_AT)
        ring = UINT32(barriers + RING_AT)
        thread = UINT32(cuda.threadIdx.x)
        warpgroup = ptx.of_first_lane(thread >> UINT32(7))
        if thread == 0:
            for i in range(NUM_STAGES):
                ptx.barrier_init(barriers + 8 * i, full_arrivals)
                ptx.barrier_init(barriers + EMPTY_AT + 8 * i, consumer_warps * blocks)
            ptx.barrier_fence()
        rank = UINT32(0)
        if is_pair:
            rank = ptx_cluster.rank()
            ptx_cluster.sync_pair()
        column_tiles = UINT32(UINT32(num_columns + output_columns - 1) // UINT32(output_columns))
        steps = UINT32(UINT32(depth + STEP - 1) // UINT32(STEP))
        if gathers:
            # Now the index is complete. The down kernel relies on that when its blocks start.
            ptx.wait_for_earlier()
        ptx.launch_dependents()
        row_tiles = load_ends(thread, UINT32(threads), offsets, num_local, ends, tile_rows)
        num_blocks = UINT32(UINT32(cuda.gridDim.x) // blocks)  # a pair counts as one
        num_rows = ptx.load_shared_u32(ends + 4 * (num_local - 1))
        whole, rest_cuts = plan_rounds(num_rows, row_tiles, column_tiles, num_blocks, max_cuts, tile_rows, blocks)
        turn = UINT32(UINT32(cuda.blockIdx.x) // blocks)
        stage = UINT32(0)
        expert = UINT32(0)
        first_tile = UINT32(0)
        begin = UINT32(0)
        if warpgroup == 0:
            keep_registers()
            parity = UINT32(1)
            issued = UINT32(0)
            if gathers or thread == 0:
                while True:
                    tile, cuts, part = tile_of(turn, whole, rest_cuts)
                    expert, first_tile, begin, end = next_expert(
                        tile, expert, first_tile, begin, ends, num_local, column_tiles, tile_rows
                    )
                    if expert >= num_local:
                        break
                    row, column = find_tile(UINT32(tile - first_tile), begin, end, column_tiles, tile_rows)
                    together = steps_in_stage(UINT32(end - row), cuts, block_rows)
                    row = UINT32(row + rank * block_rows)
                    first_column = UINT32(column * output_columns + part * (UINT32(output_columns) >> cuts))
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
                        first_column,
                        num_columns,
                        depth,
                        cuts,
                        together,
                    )
                    turn = UINT32(turn + num_blocks)
            if gathers:
                announce_rest(thread, barriers, stage, issued)
        else:
            take_registers()
            parity = UINT32(0)
            group = UINT32(warpgroup - 1)
            lane = thread & UINT32(31)
            line_of_group = UINT32(((thread >> UINT32(5)) & UINT32(3)) * 16 + (lane >> UINT32(2)))
            while True:
                tile, cuts, part = tile_of(turn, whole, rest_cuts)
                expert, first_tile, begin, end = next_expert(
                    tile, expert, first_tile, begin, ends, num_local, column_tiles, tile_rows
                )
                if expert >= num_local:
                    break
                row, column = find_tile(UINT32(tile - first_tile), begin, end, column_tiles, tile_rows)
                together = steps_in_stage(UINT32(end - row), cuts, block_rows)
                row = UINT32(row + rank * block_rows + group * GROUP_ROWS)
                first_column = UINT32(column * output_columns + part * (UINT32(output_columns) >> cuts))
                if row >= end:
                    stage, parity = skip_tile(barriers, stage, parity, steps, together, lane, blocks)
                else:
                    line = UINT32(row + line_of_group)
                    target = out + ADDRESS(line) * out_row_bytes + ADDRESS(first_column * 2)
                    rows_left = UINT32(end - line) if line < end else UINT32(0)
                    columns_left = UINT32(num_columns - first_column) if first_column < num_columns else UINT32(0)
                    gate_bias = bias + 2 * (ADDRESS(expert) * (w_rows_of_column * num_columns) + ADDRESS(first_column))
                    up_bias = gate_bias + 2 * num_columns
                    if cuts == 0:
                        stage, parity = consume_whole(
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
                            rows_left,
                            columns_left,
                            gate_bias,
                            up_bias,
                        )
                    elif cuts == 1:
                        stage, parity = consume_half(
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
                            rows_left,
                            columns_left,
                            gate_bias,
                            up_bias,
                        )
                    elif cuts == 2 or gathers:
                        stage, parity = consume_quarter(
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
                            rows_left,
                            columns_left,
                            gate_bias,
                            up_bias,
                        )
                    else:
                        stage, parity = consume_eighth(
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
                            rows_left,
                            columns_left,
                            gate_bias,
                            up_bias,
                        )
                turn = UINT32(turn + num_blocks)
        if is_pair:
            ptx_cluster.leave_pair()  # until then the other block may write here

    parameters = (ADDRESS, UINT32, ADDRESS, ADDRESS, ADDRESS, UINT32, UINT32, UINT32, ADDRESS, ADDRESS, UINT32)
    kernel = Kernel(
        grouped_gemm,
        parameters,
        threads,
        shared_bytes=shape.shared_bytes,
        hopper_only=True,
        starts_early=True,
        moves_registers=shape.moves_registers,
        cluster=shape.blocks,
        key=(gated, has_bias, activation, shape, ptx.MAX_TRIES),
    )
    box = TILE_COLUMNS // 2 if gathers else TILE_COLUMNS
    boxes = tuple(box >> c for c in range(max_cuts + 1 if gathers else max_cuts + 2))
    return GroupedKernel(kernel, output_columns, max_cuts, boxes, gated, shape)
