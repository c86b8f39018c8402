"""The warp that finds a block's tiles and fetches their queries, keys and values.

Tiles in the order in which blocks take them; a set is the heads of a tile:

    sets in blocks of `together`, whose keys and values stay in the L2 cache
        pieces in order
            a piece's tiles from the last to the first, so that the long ones come first
                the block's sets

The first blocks of the grid begin with the tile of their own number; each further tile, and the others' first, is the
next of a counter. A block that has multiplied about `limit` tiles of keys ends, which lets other kernels have its
multiprocessor; there are blocks enough behind it. The last block to end puts the counters back to 0.
"""

from __future__ import annotations

from pipemoe_kernels.attention.layout import (
    BEGIN,
    BOX_BYTES,
    END,
    FIRST_ROW,
    HAS_TILE,
    HEAD_SET,
    K_EMPTY,
    K_FULL,
    MAPS_AT,
    NUM_KEYS,
    Q_AT,
    Q_EMPTY,
    Q_FULL,
    ROWS,
    ROWS_LEFT,
    SEEN,
    V_EMPTY,
    V_FULL,
    RingLayout,
)
from pipemoe_kernels.launch.kernel import ADDRESS, INT32, UINT32
from pipemoe_kernels.launch.tensor_map import MAP_BYTES
from pipemoe_kernels.numba_cuda import cuda
from pipemoe_kernels.ptx import attention as ptx_attention
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.attention import BOX_COLUMNS, KEYS


@cuda.jit(device=True, inline="always")
def make_map(shared, template, lane, address, row_bytes, head_bytes, rows):
    """A tensor map as the template says, but of these rows at this address."""
    ptx_attention.copy_word(shared + UINT32(4) * lane, template + ADDRESS(4) * lane)
    cuda.syncwarp()
    if lane == UINT32(0):
        ptx_attention.replace_address(shared, address)
        ptx_attention.replace_rows(shared, rows)
        ptx_attention.replace_row_stride(shared, ADDRESS(row_bytes))
        ptx_attention.replace_head_stride(shared, ADDRESS(head_bytes))
    cuda.syncwarp()


@cuda.jit(device=True, inline="always")
def publish_maps(barriers, maps):
    """Copies the three maps to the block's own place in device memory, where the copy engine reads them."""
    for i in range(3):
        ptx_attention.publish_map(maps + ADDRESS(MAP_BYTES * i), barriers + UINT32(MAPS_AT + MAP_BYTES * i))
    for i in range(3):
        ptx_attention.see_map(maps + ADDRESS(MAP_BYTES * i))
    cuda.syncwarp()


@cuda.jit(device=True, inline="always")
def up_to_lane(count):
    """The sum of the values of this lane and all below."""
    count = UINT32(count + ptx.from_lane_below(count, UINT32(1)))
    count = UINT32(count + ptx.from_lane_below(count, UINT32(2)))
    count = UINT32(count + ptx.from_lane_below(count, UINT32(4)))
    count = UINT32(count + ptx.from_lane_below(count, UINT32(8)))
    return UINT32(count + ptx.from_lane_below(count, UINT32(16)))


def producer(ring: RingLayout, group: int, windowed: bool):
    """group: query heads of a tile."""
    tokens = ROWS // group
    key_boxes, value_boxes, key_bytes, value_bytes = ring.key_boxes, ring.value_boxes, ring.key_bytes, ring.value_bytes
    keys_at, values_at = ring.keys_at, ring.values_at

    @cuda.jit(device=True, inline="always")
    def tiles_of(piece, num_pieces, query_offsets):
        """Tiles of the lane's piece; 0 where there is none."""
        count = UINT32(0)
        if piece < num_pieces:
            first = ptx.load_u32(query_offsets + ADDRESS(4) * piece)
            rows = UINT32(ptx.load_u32(query_offsets + ADDRESS(4) * piece + ADDRESS(4)) - first)
            count = UINT32(UINT32(rows + UINT32(tokens - 1)) // UINT32(tokens))
        return count

    @cuda.jit(device=True, inline="always")
    def count_tiles(lane, num_pieces, query_offsets):
        num_tiles = UINT32(0)
        base = UINT32(0)
        while base < num_pieces:
            upto = up_to_lane(tiles_of(UINT32(base + lane), num_pieces, query_offsets))
            num_tiles = UINT32(num_tiles + ptx.from_lane(upto, UINT32(31)))
            base = UINT32(base + UINT32(32))
        return num_tiles

    @cuda.jit(device=True, inline="always")
    def find_piece(tile, lane, num_pieces, query_offsets):
        """Which piece a tile belongs to, and the first of its tokens there."""
        base = UINT32(0)
        before = UINT32(0)
        while True:
            count = tiles_of(UINT32(base + lane), num_pieces, query_offsets)
            upto = up_to_lane(count)
            there = ptx.from_lane(upto, UINT32(31))
            if tile < UINT32(before + there):
                break
            before = UINT32(before + there)
            base = UINT32(base + UINT32(32))
        is_behind = UINT32(1) if tile >= UINT32(before + upto) else UINT32(0)
        place = ptx_attention.count_bits(ptx.lanes_with(is_behind))
        last = UINT32(before + ptx.from_lane(upto, place) - UINT32(1))
        return UINT32(base + place), UINT32(UINT32(last - tile) * UINT32(tokens))

    @cuda.jit(device=True, inline="always")
    def load_keys(barriers, maps, it, head, row):
        """A tile of keys and of values, when the consumers are done with what is there."""
        stage = it & UINT32(1)
        parity = UINT32((it >> UINT32(1)) & UINT32(1)) ^ UINT32(1)
        full = UINT32(barriers + UINT32(K_FULL) + UINT32(8) * stage)
        shared = UINT32(barriers + UINT32(keys_at) + stage * UINT32(key_bytes))
        ptx.barrier_wait(barriers + UINT32(K_EMPTY) + UINT32(8) * stage, parity)
        ptx.barrier_expect(full, UINT32(key_bytes))
        for box in range(key_boxes):
            at = UINT32(shared + UINT32(box) * UINT32(BOX_BYTES))
            ptx.load_box_3d(at, maps + ADDRESS(MAP_BYTES), full, UINT32(box * BOX_COLUMNS), head, row)
        full = UINT32(barriers + UINT32(V_FULL) + UINT32(8) * stage)
        shared = UINT32(barriers + UINT32(values_at) + stage * UINT32(value_bytes))
        ptx.barrier_wait(barriers + UINT32(V_EMPTY) + UINT32(8) * stage, parity)
        ptx.barrier_expect(full, UINT32(value_bytes))
        for box in range(value_boxes):
            at = UINT32(shared + UINT32(box) * UINT32(BOX_BYTES))
            ptx.load_box_3d(at, maps + ADDRESS(2 * MAP_BYTES), full, UINT32(box * BOX_COLUMNS), head, row)

    @cuda.jit(device=True, inline="always")
    def produce(
        barriers,
        lane,
        maps,
        query_offsets,
        key_offsets,
        key_lengths,
        num_pieces,
        num_sets,
        sets_per_head,
        together,
        window,
        num_first,
        limit,
        counters,
    ):
        num_tiles = count_tiles(lane, num_pieces, query_offsets)
        total = UINT32(num_tiles * num_sets)
        turn = UINT32(cuda.blockIdx.x)
        if turn >= num_first:
            taken = UINT32(0)
            if lane == UINT32(0):
                taken = ptx_attention.fetch_and_add(counters, UINT32(1))
            turn = UINT32(num_first + ptx.of_first_lane(taken))
        q_parity = UINT32(1)
        it = UINT32(0)
        done = UINT32(0)
        while turn < total:
            of_block = UINT32(num_tiles * together)
            block = UINT32(turn // of_block)
            rest = UINT32(turn - block * of_block)
            sets = UINT32(min(together, UINT32(num_sets - block * together)))
            tile = UINT32(rest // sets)
            head_set = UINT32(block * together + rest - tile * sets)
            piece, row = find_piece(tile, lane, num_pieces, query_offsets)
            q_start = ptx.load_u32(query_offsets + ADDRESS(4) * piece)
            q_count = UINT32(ptx.load_u32(query_offsets + ADDRESS(4) * piece + ADDRESS(4)) - q_start)
            k_start = ptx.load_u32(key_offsets + ADDRESS(4) * piece)
            if key_lengths != ADDRESS(0):
                k_count = ptx.load_u32(key_lengths + ADDRESS(4) * piece)
            else:
                k_count = UINT32(ptx.load_u32(key_offsets + ADDRESS(4) * piece + ADDRESS(4)) - k_start)
            rows_left = UINT32(q_count - row)
            # Keys that the tile's first row sees, and its last.
            seen = INT32(INT32(row) + INT32(1) + INT32(k_count) - INT32(q_count))
            last_seen = INT32(seen + INT32(min(rows_left, UINT32(tokens))) - INT32(1))
            end = UINT32(0)
            if last_seen > INT32(0):
                end = UINT32(UINT32(UINT32(last_seen) + UINT32(KEYS - 1)) // UINT32(KEYS))
            begin = UINT32(0)
            if windowed and seen > INT32(window):
                begin = UINT32(UINT32(seen - INT32(window)) // UINT32(KEYS))
            begin = UINT32(min(begin, end))
            if lane == UINT32(0):
                ptx.barrier_wait(barriers + UINT32(Q_EMPTY), q_parity)
                ptx.store_shared_u32(barriers + UINT32(HAS_TILE), UINT32(1))
                ptx.store_shared_u32(barriers + UINT32(FIRST_ROW), UINT32(q_start + row))
                ptx.store_shared_u32(barriers + UINT32(ROWS_LEFT), rows_left)
                ptx.store_shared_u32(barriers + UINT32(HEAD_SET), head_set)
                ptx.store_shared_u32(barriers + UINT32(SEEN), UINT32(seen))
                ptx.store_shared_u32(barriers + UINT32(BEGIN), begin)
                ptx.store_shared_u32(barriers + UINT32(END), end)
                ptx.store_shared_u32(barriers + UINT32(NUM_KEYS), k_count)
                full = UINT32(barriers + UINT32(Q_FULL))
                ptx.barrier_expect(full, UINT32(key_bytes))
                first_head = UINT32(head_set * UINT32(group))
                for box in range(key_boxes):
                    at = UINT32(barriers + UINT32(Q_AT) + UINT32(box) * UINT32(BOX_BYTES))
                    ptx.load_box_3d(at, maps, full, UINT32(box * BOX_COLUMNS), first_head, UINT32(q_start + row))
                head = UINT32(head_set // sets_per_head)
                n = end
                while n > begin:
                    n = UINT32(n - UINT32(1))
                    load_keys(barriers, maps, it, head, UINT32(k_start + n * UINT32(KEYS)))
                    it = UINT32(it + UINT32(1))
            q_parity ^= UINT32(1)
            done = UINT32(done + max(UINT32(1), UINT32(end - begin)))
            if done >= limit:
                break
            taken = UINT32(0)
            if lane == UINT32(0):
                taken = ptx_attention.fetch_and_add(counters, UINT32(1))
            turn = UINT32(num_first + ptx.of_first_lane(taken))
        if lane == UINT32(0):
            ptx.barrier_wait(barriers + UINT32(Q_EMPTY), q_parity)
            ptx.store_shared_u32(barriers + UINT32(HAS_TILE), UINT32(0))
            ptx.barrier_arrive(barriers + UINT32(Q_FULL))
            ended = ptx_attention.fetch_and_add(counters + ADDRESS(4), UINT32(1))
            if ended == UINT32(cuda.gridDim.x - 1):
                ptx_attention.store_u32(counters, UINT32(0))
                ptx_attention.store_u32(counters + ADDRESS(4), UINT32(0))

    return produce
