"""Raster of the arrival-driven GEMM: batches of parts that have arrived, and the rows of a batch's tiles.

    flags [S]       | e | - | e | - |        parts 0 and 2 have arrived: their flag is this call's epoch e
    batches [S]     | e: 0101 | - | - | - |  the first batch is these two, as the first block to see them wrote down

    rows of one expert in a batch      part 0: places 7, 8, 9   part 2: places 50, 51      tile rows 0 1 2 | 3 4

A block that has done its share of a batch looks at the next one. If no block has formed it, it becomes all parts that
have arrived and are in no earlier batch; while there are none, the block waits. So late parts share tiles, and the
weights that these read, with all that came while the blocks were busy. Nobody waits for one part while another is
there.

The place of a pair, which is its row of a and y, is known when its part is there: K * the part's first row, plus the
pair's place in the part's own index (index/hopper.py).
"""

from __future__ import annotations

from pipemoe_kernels.gemm.raster import MAX_EXPERTS, ONE, TILE_ROWS
from pipemoe_kernels.launch.kernel import ADDRESS, UINT32
from pipemoe_kernels.numba_cuda import cuda
from pipemoe_kernels.ptx import arrivals as ptx
from pipemoe_kernels.ptx.hopper import add_shared_u32, load_shared_u32, load_u32, store_shared_u32

MAX_PARTS = 8
PRODUCERS = UINT32(128)
WORD = UINT32(4)
# Shared memory at `table`: for each part the ends of its experts (rows of MAX_EXPERTS), then the parts' first rows.
FIRST_ROWS_AT = UINT32(4 * MAX_PARTS * MAX_EXPERTS)
TABLE_BYTES = 4 * MAX_PARTS * (MAX_EXPERTS + 1)


@cuda.jit(device=True, inline="always")
def sync_producers():
    """The 128 threads of the first warpgroup wait for one another."""
    cuda.syncwarp()  # also keeps the compiler from copying the barrier into each branch before it
    ptx.barrier_of_producers()


@cuda.jit(device=True, inline="always")
def claim_batch(flags, num_parts, epoch, done, word):
    """The parts of the batch at address `word`, as bits, without those in `done`. One thread calls it."""
    batch = UINT32(0)
    while batch == 0:
        found = ptx.load_batch(word)
        if UINT32(found >> ADDRESS(32)) == epoch:
            batch = UINT32(found & ADDRESS(0xFFFFFFFF))
        else:
            arrived = UINT32(0)
            for part in range(num_parts):
                bit = UINT32(ONE << UINT32(part))
                if done & bit == 0 and ptx.load_flag(flags + WORD * UINT32(part)) == epoch:
                    arrived = UINT32(arrived | bit)
            if arrived == 0:
                ptx.pause()
            elif ptx.replace_batch(word, found, (ADDRESS(epoch) << ADDRESS(32)) | ADDRESS(arrived)) == found:
                batch = arrived
    return batch


@cuda.jit(device=True, inline="always")
def load_batch_ends(thread, batch, part_ends, num_parts, num_local, table, ends):
    """Copy the ends of the batch's parts, their sums, and the number of row tiles behind. All producers call it."""
    num_tiles_at = UINT32(ends + WORD * num_local)
    sync_producers()  # nobody still reads those of the last batch
    if thread == UINT32(0):
        store_shared_u32(num_tiles_at, UINT32(0))
    for expert in range(thread, num_local, PRODUCERS):
        end = UINT32(0)
        for part in range(num_parts):
            if batch & UINT32(ONE << UINT32(part)):
                part_end = load_u32(part_ends + WORD * UINT32(part * num_local + expert))
                store_shared_u32(UINT32(table + WORD * UINT32(part * MAX_EXPERTS + expert)), part_end)
                end = UINT32(end + part_end)
        store_shared_u32(UINT32(ends + WORD * expert), end)
    sync_producers()
    for expert in range(thread, num_local, PRODUCERS):
        end = load_shared_u32(UINT32(ends + WORD * expert))
        begin = load_shared_u32(UINT32(ends + WORD * (expert - ONE))) if expert > 0 else UINT32(0)
        add_shared_u32(num_tiles_at, UINT32(UINT32(end - begin + TILE_ROWS - ONE) // TILE_ROWS))
    sync_producers()
    return load_shared_u32(num_tiles_at)


@cuda.jit(device=True, inline="always")
def find_place(number, expert, batch, table, top_k):
    """For the expert's row `number` of a batch: its place, and the first row of its part."""
    part = UINT32(0)
    while True:
        if batch & UINT32(ONE << part):
            at = UINT32(table + WORD * UINT32(part * UINT32(MAX_EXPERTS) + expert))
            begin = load_shared_u32(UINT32(at - WORD)) if expert > 0 else UINT32(0)
            count = UINT32(load_shared_u32(at) - begin)
            if number < count:
                first_row = load_shared_u32(UINT32(table + FIRST_ROWS_AT + WORD * part))
                return UINT32(first_row * top_k + begin + number), first_row
            number = UINT32(number - count)
        part = UINT32(part + ONE)
