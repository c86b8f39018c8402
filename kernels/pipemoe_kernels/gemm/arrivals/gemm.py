"""Grouped GEMM over the rows of a wave that arrives in parts: one launch, which takes the tiles of the parts that are
there.

    lane of the communication      rows 0 | index 0 | flag 0 | rows 1 | index 1 | flag 1 | ...
    one persistent launch          waits for flags, takes batches of parts (raster.py): a = activation(x gate^T) ...
    another, behind it             y = a down^T

All else is as in gemm/wgmma.py, with the same tiles, sums and bits. But a tile may hold rows of several parts, which
are not adjacent, so both GEMMs gather them: the first from the wire buffer, the second from a. Only producers know
batches: they write a tile's rows and shape into shared memory beside the tile's first stage, and consumers read them
there.

    note of a stage    rows in the tile (0: no more tiles) | expert | first column | cuts | places [128] | rows [128]

The first launch needs room beside all collectives that may be under way, and so does the index of a part. Work that
comes before a flag must never wait for this launch. It lets no other kernel start early before the last part is there.
"""

from __future__ import annotations

from functools import cache

import torch

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.arrivals.parts import Parts
from pipemoe_kernels.gemm.arrivals.raster import (
    FIRST_ROWS_AT,
    MAX_PARTS,
    TABLE_BYTES,
    claim_batch,
    find_place,
    load_batch_ends,
    sync_producers,
)
from pipemoe_kernels.gemm.raster import find_tile, next_expert, plan_rounds, steps_in_stage, tile_of
from pipemoe_kernels.gemm.ring import CONSUMERS, EMPTY_AT, GROUP_ROWS, NUM_STAGES, TILE_ROWS, announce_rest, skip_tile
from pipemoe_kernels.gemm.roles import PART_COLUMNS, consumer, gathering_producer
from pipemoe_kernels.gemm.tile_shape import ALIGNMENT, ENDS_AT, RING_AT, ROWS_128, TILE_COLUMNS
from pipemoe_kernels.gemm.wgmma import GroupedKernel
from pipemoe_kernels.launch.kernel import ADDRESS, UINT32, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.wgmma import STEP

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 80, 216
MAX_CUTS = 2
W_BOXES = tuple(TILE_COLUMNS // 2 >> c for c in range(MAX_CUTS + 1))
MAX_OUT_BYTES = 1 << 32
PLACES_AT = 16
SOURCES_AT = PLACES_AT + 4 * TILE_ROWS
NOTE_BYTES = SOURCES_AT + 4 * TILE_ROWS
SHARED_BYTES = ROWS_128.shared_bytes + NUM_STAGES * NOTE_BYTES + TABLE_BYTES + 16


@cache
def arrivals_kernel(*, gated: bool, has_bias: bool = False, activation: str | Gating | None = None) -> GroupedKernel:
    """With an activation: the first GEMM, which waits for parts, as in wgmma.grouped_kernel. None: the second one."""
    waits = activation is not None
    output_columns = TILE_COLUMNS // 2 if gated else TILE_COLUMNS
    consume_whole, consume_half, consume_quarter = (
        consumer(TILE_COLUMNS >> c, gated, has_bias, activation) for c in range(3)
    )
    produce = gathering_producer(gated, listed=True)
    w_rows_of_column = 2 if gated else 1
    stage_bytes = ROWS_128.stage_bytes
    keep_registers, take_registers = ptx.keep_registers(PRODUCER_REGISTERS), ptx.take_registers(CONSUMER_REGISTERS)

    def arriving_gemm(
        x,
        x_stride,
        tokens,
        top_k,
        part_ends,
        num_parts,
        row_0,
        row_1,
        row_2,
        row_3,
        row_4,
        row_5,
        row_6,
        row_7,
        flags,
        epoch,
        batches,
        w_map,
        first_w_row,
        num_local,
        num_columns,
        depth,
        bias,
        out,
        out_row_bytes,
    ):
        barriers = ptx.shared_address(cuda.shared.array(0, types.uint8, ALIGNMENT))
        ends = UINT32(barriers + ENDS_AT)
        ring = UINT32(barriers + RING_AT)
        notes = UINT32(ring + NUM_STAGES * stage_bytes)
        table = UINT32(notes + NUM_STAGES * NOTE_BYTES)
        batch_at = UINT32(table + TABLE_BYTES)
        thread = UINT32(cuda.threadIdx.x)
        lane = thread & UINT32(31)
        warpgroup = ptx.of_first_lane(thread >> UINT32(7))
        if thread == 0:
            for i in range(NUM_STAGES):
                ptx.barrier_init(
                    barriers + 8 * i, 5
                )  # the bulk copies' thread, and one thread of each warp that gathers
                ptx.barrier_init(barriers + EMPTY_AT + 8 * i, 4 * CONSUMERS)
            ptx.barrier_fence()
            first_rows = UINT32(table + FIRST_ROWS_AT)
            ptx.store_shared_u32(first_rows, row_0)
            ptx.store_shared_u32(first_rows + 4, row_1)
            ptx.store_shared_u32(first_rows + 8, row_2)
            ptx.store_shared_u32(first_rows + 12, row_3)
            ptx.store_shared_u32(first_rows + 16, row_4)
            ptx.store_shared_u32(first_rows + 20, row_5)
            ptx.store_shared_u32(first_rows + 24, row_6)
            ptx.store_shared_u32(first_rows + 28, row_7)
        ptx.wait_for_earlier()
        if not waits:
            ptx.launch_dependents()
        cuda.syncthreads()
        steps = UINT32(UINT32(depth + STEP - 1) // UINT32(STEP))
        stage = UINT32(0)
        if warpgroup == 0:
            keep_registers()
            column_tiles = UINT32(UINT32(num_columns + output_columns - 1) // UINT32(output_columns))
            num_blocks = UINT32(cuda.gridDim.x)
            turn = UINT32(cuda.blockIdx.x)
            all_parts = UINT32((UINT32(1) << num_parts) - UINT32(1))
            parity = UINT32(1)
            issued = UINT32(0)
            done = UINT32(0)
            batch = all_parts
            while done != all_parts:
                if waits:
                    if thread == 0:
                        ptx.store_shared_u32(batch_at, claim_batch(flags, num_parts, epoch, done, batches))
                    sync_producers()
                    batch = ptx.load_shared_u32(batch_at)
                    batches += ADDRESS(8)
                done = UINT32(done | batch)
                if waits and done == all_parts:
                    # Not before: blocks of the next kernel might take the room that the awaited parts need.
                    ptx.launch_dependents()
                row_tiles = load_batch_ends(thread, batch, part_ends, num_parts, num_local, table, ends)
                num_rows = ptx.load_shared_u32(ends + 4 * (num_local - 1))
                whole, rest_cuts = plan_rounds(
                    num_rows, row_tiles, column_tiles, num_blocks, MAX_CUTS, UINT32(TILE_ROWS)
                )
                num_turns = UINT32(whole + (UINT32(row_tiles * column_tiles - whole) << rest_cuts))
                expert = UINT32(0)
                first_tile = UINT32(0)
                begin = UINT32(0)
                while turn < num_turns:
                    tile, cuts, cut = tile_of(turn, whole, rest_cuts)
                    expert, first_tile, begin, end = next_expert(
                        tile, expert, first_tile, begin, ends, num_local, column_tiles, UINT32(TILE_ROWS)
                    )
                    row, column = find_tile(UINT32(tile - first_tile), begin, end, column_tiles, UINT32(TILE_ROWS))
                    count = UINT32(min(UINT32(end - row), UINT32(TILE_ROWS)))
                    first_column = UINT32(column * output_columns + cut * (UINT32(output_columns) >> cuts))
                    at = UINT32(notes + stage * NOTE_BYTES)
                    ptx.barrier_wait(barriers + EMPTY_AT + 8 * stage, parity)
                    if thread < count:
                        place, first_row = find_place(UINT32(row - begin + thread), expert, batch, table, top_k)
                        source = place
                        if waits:
                            source = UINT32(first_row + ptx.load_u32(tokens + 4 * ADDRESS(place)))
                        ptx.store_shared_u32(at + PLACES_AT + 4 * thread, place)
                        ptx.store_shared_u32(at + SOURCES_AT + 4 * thread, source)
                    if thread == 0:
                        ptx.store_shared_u32(at, count)
                        ptx.store_shared_u32(at + 4, expert)
                        ptx.store_shared_u32(at + 8, first_column)
                        ptx.store_shared_u32(at + 12, cuts)
                    sync_producers()
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
                        at + SOURCES_AT,
                        w_map,
                        expert,
                        UINT32(0),
                        count,
                        UINT32(first_w_row + first_column),
                        num_columns,
                        depth,
                        cuts,
                        steps_in_stage(count, cuts, UINT32(TILE_ROWS)),
                    )
                    turn = UINT32(turn + num_blocks)
                turn = UINT32(turn - num_turns)
                # The next part may be long in coming.
                announce_rest(thread, barriers, stage, issued)
                issued = UINT32(0)
            full = UINT32(barriers + 8 * stage)
            ptx.barrier_wait(full + EMPTY_AT, parity)
            if thread == 0:
                ptx.store_shared_u32(notes + stage * NOTE_BYTES, UINT32(0))
                ptx.barrier_arrive(full)
            if lane == 0:
                ptx.barrier_arrive(full)
        else:
            take_registers()
            parity = UINT32(0)
            group = UINT32(warpgroup - 1)
            line_of_group = UINT32(((thread >> UINT32(5)) & UINT32(3)) * 16 + (lane >> UINT32(2)))
            while True:
                at = UINT32(notes + stage * NOTE_BYTES)
                ptx.barrier_wait(barriers + 8 * stage, parity)
                count = ptx.load_shared_u32(at)
                if count == 0:
                    break
                expert = ptx.load_shared_u32(at + 4)
                first_column = ptx.load_shared_u32(at + 8)
                cuts = ptx.load_shared_u32(at + 12)
                # A thread has the rows `line` and `line + 8`; places ascend in a tile.
                line = UINT32(group * GROUP_ROWS + line_of_group)
                place = ptx.load_shared_u32(at + PLACES_AT + 4 * line)
                apart = UINT32(ptx.load_shared_u32(at + PLACES_AT + 4 * line + 32) - place)
                cuda.syncwarp()  # all lanes have read before one gives the stage back
                together = steps_in_stage(count, cuts, UINT32(TILE_ROWS))
                if group * GROUP_ROWS >= count:
                    stage, parity = skip_tile(barriers, stage, parity, steps, together, lane)
                else:
                    eighth = UINT32((ADDRESS(apart) * out_row_bytes) >> ADDRESS(3))
                    target = out + ADDRESS(place) * out_row_bytes + ADDRESS(first_column * 2)
                    rows_left = UINT32(count - line) if line < count else UINT32(0)
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
                            eighth,
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
                            eighth,
                            rows_left,
                            columns_left,
                            gate_bias,
                            up_bias,
                        )
                    else:
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
                            eighth,
                            rows_left,
                            columns_left,
                            gate_bias,
                            up_bias,
                        )

    of_parts = (ADDRESS, UINT32, ADDRESS, UINT32, *[UINT32] * MAX_PARTS, ADDRESS, UINT32, ADDRESS)
    kernel = Kernel(
        arriving_gemm,
        (ADDRESS, UINT32, *of_parts, ADDRESS, UINT32, UINT32, UINT32, UINT32, ADDRESS, ADDRESS, UINT32),
        ROWS_128.threads,
        shared_bytes=SHARED_BYTES,
        hopper_only=True,
        starts_early=True,
        key=(gated, has_bias, activation, ptx.MAX_TRIES),
    )
    return GroupedKernel(kernel, output_columns, MAX_CUTS, W_BOXES, gated)


def gate_up_arriving(
    stream: Stream,
    kernel: GroupedKernel,
    hidden: torch.Tensor,
    parts: Parts,
    gate_up_maps: int,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    num_sms: int,
) -> None:
    """a[p] = activation(gate x) * (up x) for the places p of all parts, as these arrive; x: the row of the pair at p.

    hidden [n, H] bfloat16: all parts' rows, strided on 16-byte boundaries; gate_up_maps: address of the tensor maps of
    [E_loc, 2I, H] with boxes of W_BOXES; bias [E_loc, 2I] or None; a [K n, I]: rows without a place stay as they are.
    """
    num_pairs, intermediate = a.shape
    num_local = parts.ends.shape[1]
    w_rows = 2 * intermediate if kernel.gated else intermediate
    row_bytes = hidden.stride(0) * 2
    assert hidden.dtype == a.dtype == torch.bfloat16 and num_pairs == len(hidden) * parts.top_k <= len(parts.tokens)
    assert hidden.shape[1] % PART_COLUMNS == 0 and intermediate % PART_COLUMNS == 0, (hidden.shape, a.shape)
    assert hidden.stride(1) == 1 and hidden.data_ptr() % 16 == 0 and row_bytes % 16 == 0, hidden.stride()
    assert a.is_contiguous() and a.data_ptr() % 16 == 0 and a.nbytes < MAX_OUT_BYTES, a.shape
    assert bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous() and bias.shape == (num_local, w_rows))
    kernel.kernel.launch(
        stream,
        (_num_blocks(kernel, num_pairs, num_local, intermediate, num_sms, len(parts.first_rows)), 1),
        hidden,
        row_bytes // 16,
        *parts.arguments(),
        gate_up_maps,
        0,
        num_local,
        intermediate,
        hidden.shape[1],
        hidden if bias is None else bias,
        a,
        2 * intermediate,
    )


def down_arrived(
    stream: Stream,
    kernel: GroupedKernel,
    a: torch.Tensor,
    parts: Parts,
    down_maps: int,
    y: torch.Tensor,
    num_sms: int,
    first_column: int = 0,
) -> None:
    """y[p] = down a[p] for the places of all parts, or only its columns from `first_column` on. All parts have arrived.

    It does not start early: its blocks would take the multiprocessors that the previous kernel leaves to collectives.

    a [K n, I] contiguous; down_maps: address of the tensor maps of [E_loc, H, I] with boxes of W_BOXES; y [K n,
    columns], rows strided.
    """
    num_pairs, intermediate = a.shape
    num_local, columns = parts.ends.shape[1], y.shape[1]
    assert a.dtype == y.dtype == torch.bfloat16 and a.is_contiguous() and a.data_ptr() % 16 == 0 and y.stride(1) == 1
    assert len(y) == num_pairs and num_pairs * y.stride(0) * 2 < MAX_OUT_BYTES, (y.shape, y.stride())
    assert y.data_ptr() % 16 == 0 and y.stride(0) % PART_COLUMNS == 0, y.stride()
    assert columns % PART_COLUMNS == 0 and intermediate % PART_COLUMNS == 0, (columns, intermediate)
    kernel.kernel.launch(
        stream,
        (_num_blocks(kernel, num_pairs, num_local, columns, num_sms, 1), 1),
        a,
        intermediate * 2 // 16,
        *parts.arguments(),
        down_maps,
        first_column,
        num_local,
        columns,
        intermediate,
        a,
        y,
        2 * y.stride(0),
        may_start_early=False,
    )


def _num_blocks(
    kernel: GroupedKernel, num_pairs: int, num_local: int, num_columns: int, num_sms: int, most_batches: int
) -> int:
    """At most as many blocks as there can be slices of tiles in so many batches, whatever the routing."""
    row_tiles = num_pairs // TILE_ROWS + min(most_batches * num_local, num_pairs)
    return min(num_sms, row_tiles * -(-num_columns // kernel.output_columns) << kernel.max_cuts)
