"""Raster: which tile of which expert a block takes, from the experts' ends alone; no schedule is stored.

    tiles of one expert: row tiles x column tiles
    | 0  3  6 |        numbered so that blocks of neighbouring numbers share operands in the L2 cache: bands of at most
    | 1  4  7 |        BAND_ROWS row tiles, and in a band down the row tiles first
    | 2  5  8 |        (here one band of 3 row tiles)

All blocks take one tile in each round. If the last round has few tiles, they are cut into 2, 4 or 8 slices of columns,
so that the round keeps more blocks busy for less time.
"""

from __future__ import annotations

from pipemoe_kernels.launch.kernel import UINT32
from pipemoe_kernels.numba_cuda import cuda
from pipemoe_kernels.ptx import hopper as ptx

MAX_EXPERTS = 512
BAND_ROWS = UINT32(2048)
TILE_ROWS = UINT32(128)  # unless a kernel says otherwise
ONE = UINT32(1)
# A step of a whole tile of 128 rows multiplies for 1024 cycles, and takes 32 KB of w and 16 KB of x from the L2 cache.
# That gives a single multiprocessor at most 64 bytes a cycle, and about half of that when all of them ask.
WHOLE_KB, ROWS_OF_KB, CYCLES_OF_KB, SHARED_CYCLES_OF_KB = UINT32(32), UINT32(8), UINT32(16), UINT32(32)
ROUND_CYCLES = UINT32(64)  # a step's other costs, with its share of the tile's start and end


@cuda.jit(device=True, inline="always")
def load_ends(thread, threads, offsets, num_local, ends, tile_rows=TILE_ROWS):
    """Copy the experts' ends to shared memory, and the number of row tiles behind. All threads of a block call it."""
    num_tiles_at = UINT32(ends + UINT32(4) * num_local)
    if thread == UINT32(0):
        ptx.store_shared_u32(num_tiles_at, UINT32(0))
    cuda.syncthreads()
    for i in range(thread, num_local, threads):
        end = ptx.load_u32(offsets + UINT32(4) * i)
        begin = ptx.load_u32(offsets + UINT32(4) * (i - ONE)) if i > 0 else UINT32(0)
        ptx.store_shared_u32(ends + UINT32(4) * i, end)
        ptx.add_shared_u32(num_tiles_at, UINT32(UINT32(end - begin + tile_rows - ONE) // tile_rows))
    cuda.syncthreads()
    return ptx.load_shared_u32(num_tiles_at)


@cuda.jit(device=True, inline="always")
def plan_rounds(num_rows, row_tiles, column_tiles, num_blocks, max_cuts, tile_rows=TILE_ROWS, blocks=ONE):
    """How many tiles stay whole, and cuts: the others have 2 ** cuts slices, as many as the estimate of time favours.

    blocks: how many share a tile's rows and w; if 2, num_blocks counts pairs.
    """
    num_tiles = UINT32(row_tiles * column_tiles)
    whole = UINT32(num_tiles // num_blocks * num_blocks)
    rest = UINT32(num_tiles - whole)
    x_kb = UINT32(num_rows // UINT32(ROWS_OF_KB * max(row_tiles, ONE) * blocks))
    block_rows = UINT32(tile_rows // blocks)
    cuts = UINT32(0)
    least = UINT32(0xFFFFFFFF)
    for c in range(max_cuts + 1):
        slices = UINT32(rest << UINT32(c))
        rounds = UINT32(UINT32(slices + num_blocks - ONE) // num_blocks)
        w_kb = UINT32(WHOLE_KB >> UINT32(c))
        kb = UINT32(x_kb + w_kb // blocks)
        shared = UINT32(UINT32(kb * SHARED_CYCLES_OF_KB * slices) // UINT32(max(rounds * num_blocks, ONE)))
        cycles = UINT32(
            max(max(UINT32(w_kb * (block_rows >> UINT32(2))), UINT32(kb * CYCLES_OF_KB)), shared) + ROUND_CYCLES
        )
        if UINT32(rounds * cycles) < least:
            least = UINT32(rounds * cycles)
            cuts = UINT32(c)
    return whole, cuts


@cuda.jit(device=True, inline="always")
def steps_in_stage(num_rows, cuts, tile_rows=TILE_ROWS):
    """log2 of the steps of k that one stage holds: a slice leaves room for several, with w's slice and a box of x."""
    stage_kb = UINT32(WHOLE_KB + tile_rows // ROWS_OF_KB)
    box_rows = tile_rows
    half = UINT32(64)
    if tile_rows > UINT32(128):
        half = UINT32(128)
    while half >= UINT32(16) and num_rows <= half:
        box_rows = half
        half = UINT32(half >> ONE)
    kb = UINT32((WHOLE_KB >> cuts) + box_rows // ROWS_OF_KB)
    together = UINT32(0)
    while UINT32(kb << UINT32(together + ONE)) <= stage_kb:
        together = UINT32(together + ONE)
    return together


@cuda.jit(device=True, inline="always")
def tile_of(turn, whole, cuts):
    """The tile of a turn (turns count over all blocks and rounds), its cuts, and which slice of it."""
    if turn < whole:
        return turn, UINT32(0), UINT32(0)
    slice_number = UINT32(turn - whole)
    return UINT32(whole + (slice_number >> cuts)), cuts, UINT32(slice_number & UINT32((ONE << cuts) - ONE))


@cuda.jit(device=True, inline="always")
def next_expert(tile, expert, first_tile, begin, ends, num_local, column_tiles, tile_rows=TILE_ROWS):
    """Move from `expert`, whose tiles start at number `first_tile` and rows at `begin`, to the expert of `tile`.

    ends: shared-memory address of each expert's end. Returns expert (num_local: no such tile), first_tile, begin, end.
    """
    end = begin
    while expert < num_local:
        end = ptx.load_shared_u32(ends + UINT32(4) * expert)
        num_tiles = UINT32(UINT32(end - begin + tile_rows - ONE) // tile_rows * column_tiles)
        if tile < UINT32(first_tile + num_tiles):
            break
        first_tile = UINT32(first_tile + num_tiles)
        begin = end
        expert = UINT32(expert + ONE)
    return expert, first_tile, begin, end


@cuda.jit(device=True, inline="always")
def find_tile(number, begin, end, column_tiles, tile_rows=TILE_ROWS):
    """First row and column tile of the expert's tile `number`."""
    row_tiles = UINT32(UINT32(end - begin + tile_rows - ONE) // tile_rows)
    max_band = UINT32(BAND_ROWS // tile_rows)
    num_bands = UINT32(UINT32(row_tiles + max_band - ONE) // max_band)
    band_rows = UINT32(UINT32(row_tiles + num_bands - ONE) // num_bands)
    band_tiles = UINT32(band_rows * column_tiles)
    band = UINT32(number // band_tiles)
    number = UINT32(number - band * band_tiles)
    first = UINT32(band * band_rows)
    band_rows = UINT32(min(band_rows, UINT32(row_tiles - first)))
    column = UINT32(number // band_rows)
    row_tile = UINT32(first + number - column * band_rows)
    return UINT32(begin + row_tile * tile_rows), column
