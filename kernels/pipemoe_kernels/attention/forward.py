"""Causal attention over packed sequences on Hopper's tensor cores, one launch for all sequences and heads.

    queries [T, Hq, D]      a tile: 128 rows = 128 / G tokens x the G query heads of one key head     (G divides 128)
    keys    [S, Hkv, D]     its keys, 128 at a time, from the last that it may see to the first
    values  [S, Hkv, Dv]
    out     [T, Hq, Dv]

    block = warpgroups:  producer   a warp finds tiles, and fetches queries, keys and values by the bulk copy engine
                         consumers  two, each has 64 of the rows; one multiplies while the other takes exponentials

    shared memory:  | barriers, what the tile is | queries | keys: 2 stages | values: 2 stages |

Blocks take tiles one after the other (producer.py), so it does no harm if some start late, as collectives may hold
their multiprocessors. Nothing depends on how long sequences are but the grid.

A row's bits depend on its own sequence up to it and on its place in it, on no neighbour in the pack: tiles of keys
begin at the sequence's first key, and what lies behind its last one is not read as values.

Ideas: FlashAttention 3 (warpgroups that take turns, exponentials beside products, heads packed into rows).
"""

from __future__ import annotations

from pipemoe_kernels.attention.consumer import consumer
from pipemoe_kernels.attention.layout import (
    ALIGNMENT,
    CONSUMER_REGISTERS,
    CONSUMER_WARPS,
    K_EMPTY,
    K_FULL,
    MAPS_AT,
    NUM_STAGES,
    PRODUCER_REGISTERS,
    Q_EMPTY,
    Q_FULL,
    THREADS,
    V_EMPTY,
    V_FULL,
    RingLayout,
)
from pipemoe_kernels.attention.producer import make_map, producer, publish_maps
from pipemoe_kernels.launch.kernel import ADDRESS, INT32, UINT32, Kernel, kernel_factory
from pipemoe_kernels.launch.tensor_map import MAP_BYTES
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx import warp as ptx_warp
from pipemoe_kernels.ptx.attention import attention_products, multiprocessor


@kernel_factory
def attention_kernel(
    head_dim: int, value_dim: int, group: int, *, half: bool = False, windowed: bool = False
) -> Kernel:
    """group: query heads in a tile. half: float16, else bfloat16. packed.py says what the parameters are."""
    ring = RingLayout(head_dim, value_dim)
    produce = producer(ring, group, windowed)
    consume = consumer(attention_products(head_dim, value_dim, half=half), ring, group, windowed)
    keep_registers, take_registers = ptx.keep_registers(PRODUCER_REGISTERS), ptx.take_registers(CONSUMER_REGISTERS)

    def attend_pieces(
        templates,
        own_maps,
        queries,
        q_row_bytes,
        q_head_bytes,
        num_queries,
        keys,
        k_row_bytes,
        k_head_bytes,
        values,
        v_row_bytes,
        v_head_bytes,
        num_keys,
        query_offsets,
        key_offsets,
        key_lengths,
        num_pieces,
        num_sets,
        sets_per_head,
        together,
        scale_bits,
        window,
        num_first,
        limit,
        counters,
        out,
        out_row_bytes,
        out_head_bytes,
    ):
        array = ptx.shared_address(cuda.shared.array(0, types.uint8, ALIGNMENT))
        barriers = UINT32((array + UINT32(ALIGNMENT - 1)) & UINT32(0xFFFFFFFF - (ALIGNMENT - 1)))
        thread = UINT32(cuda.threadIdx.x)
        warpgroup = ptx.of_first_lane(thread >> UINT32(7))
        lane = thread & UINT32(31)
        if thread == UINT32(0):
            ptx.barrier_init(barriers + UINT32(Q_FULL), UINT32(1))
            ptx.barrier_init(barriers + UINT32(Q_EMPTY), UINT32(CONSUMER_WARPS))
            for i in range(NUM_STAGES):
                ptx.barrier_init(barriers + UINT32(K_FULL + 8 * i), UINT32(1))
                ptx.barrier_init(barriers + UINT32(V_FULL + 8 * i), UINT32(1))
                ptx.barrier_init(barriers + UINT32(K_EMPTY + 8 * i), UINT32(CONSUMER_WARPS))
                ptx.barrier_init(barriers + UINT32(V_EMPTY + 8 * i), UINT32(CONSUMER_WARPS))
            ptx.barrier_fence()
        ptx.launch_dependents()
        cuda.syncthreads()
        if warpgroup == UINT32(0):
            keep_registers()
            if thread < UINT32(32):
                shared = UINT32(barriers + UINT32(MAPS_AT))
                make_map(shared, templates, lane, queries, q_row_bytes, q_head_bytes, num_queries)
                shared = UINT32(shared + UINT32(MAP_BYTES))
                make_map(shared, templates + ADDRESS(MAP_BYTES), lane, keys, k_row_bytes, k_head_bytes, num_keys)
                shared = UINT32(shared + UINT32(MAP_BYTES))
                make_map(shared, templates + ADDRESS(2 * MAP_BYTES), lane, values, v_row_bytes, v_head_bytes, num_keys)
                # Behind the barrier of programmatic launches: an earlier launch may still use the maps' place.
                ptx.wait_for_earlier()
                maps = own_maps + ADDRESS(3 * MAP_BYTES) * ADDRESS(multiprocessor())
                publish_maps(barriers, maps)
                produce(
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
                )
        else:
            take_registers()
            scale = ptx_warp.from_bits(scale_bits)
            group_of = UINT32(warpgroup - UINT32(1))
            consume(barriers, thread, group_of, lane, scale, window, out, out_row_bytes, out_head_bytes)

    rows = (ADDRESS, UINT32, UINT32)
    parameters = (
        *(ADDRESS, ADDRESS, *rows, UINT32, *rows, *rows, UINT32),
        *(ADDRESS, ADDRESS, ADDRESS, UINT32),
        *(UINT32, UINT32, UINT32, UINT32, INT32, UINT32, UINT32, ADDRESS, *rows),
    )
    return Kernel(
        attend_pieces,
        parameters,
        THREADS,
        shared_bytes=ring.shared_bytes,
        hopper_only=True,
        starts_early=True,
        moves_registers=True,
        key=(head_dim, value_dim, group, half, windowed, ptx.MAX_TRIES),
    )
