"""Experts on up to MOST_ROWS rows, without an index: each block finds in the rows' ids what it has to do.

    x [T, H], ids [T, K] --gate_up--> a [T K, I] --down--> out [T, H]

    gate_up   block (i, p): gate and up rows 8 i .. 8 i + 7 of pair p's expert, for all rows that have it; nothing if an
              earlier pair has the same expert
    down      block (i, t): columns 16 i .. 16 i + 15 of row t: the weighted sum over its experts

Both fetch as few.py does; down asks for its weights while gate_up runs. An id below `first_expert` or behind the last
local one is no expert here. Sums are float32, over a row's experts in ascending k, and rounded once.
"""

from __future__ import annotations

import torch

from pipemoe_kernels.element import ELEMENTS
from pipemoe_kernels.gating import Gating
from pipemoe_kernels.launch.kernel import ADDRESS, INT32, UINT32, Kernel, Stream, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import hopper as ptx
from pipemoe_kernels.ptx.few import ROWS, SLICE, STAGED_BYTES, STEPS, copy_16, few_products, gated, wait_for_copies
from pipemoe_kernels.ptx.warp import from_bits

MOST_ROWS = 4
MOST_WARPS = 24
ALIGNMENT = 16
HALF_ROWS = ROWS // 2


@kernel_factory
def few_gate_up_kernel(hidden: int, top_k: int, gating: str | Gating) -> Kernel:
    warps = hidden // SLICE
    threads = 32 * warps
    products = few_products(threads, 1)
    times_up = gated(gating)
    store = ELEMENTS[torch.bfloat16].store
    num_partial = 32 * warps * 4

    def few_gate_up(x, x_row_bytes, num_rows, ids, id_row_bytes, first_expert, num_local, w, intermediate, a):
        partial = cuda.shared.array(num_partial, types.float32)
        base = ptx.shared_address(cuda.shared.array(0, types.uint8))
        thread = UINT32(cuda.threadIdx.x)
        lane, warp = thread & UINT32(31), thread >> UINT32(5)
        pair = UINT32(cuda.blockIdx.y)
        ptx.wait_for_earlier()
        ptx.launch_dependents()  # only now: `down` relies on the ids when it starts
        mine = ids + ADDRESS(pair // UINT32(top_k)) * ADDRESS(id_row_bytes)
        expert = UINT32(ptx.load_u32(mine + ADDRESS(4) * ADDRESS(pair % UINT32(top_k))) - UINT32(first_expert))
        is_taken = UINT32(0)
        for begin in range(0, MOST_ROWS * top_k, 32):
            other = UINT32(begin) + lane
            same = UINT32(0)
            if other < pair:
                address = ids + ADDRESS(other // UINT32(top_k)) * ADDRESS(id_row_bytes)
                found = ptx.load_u32(address + ADDRESS(4) * ADDRESS(other % UINT32(top_k)))
                if UINT32(found - UINT32(first_expert)) == expert:
                    same = UINT32(1)
            is_taken = UINT32(is_taken | ptx.lanes_with(same))
        if is_taken == UINT32(0) and expert < num_local:
            group, column = lane >> UINT32(2), UINT32(warp * UINT32(SLICE) + (lane & UINT32(3)) * UINT32(8))
            first = UINT32(cuda.blockIdx.x) * UINT32(HALF_ROWS)
            stage = ((base + UINT32(ALIGNMENT - 1)) & UINT32(0xFFFFFFFF - (ALIGNMENT - 1))) + thread * UINT32(16)
            row_of_w = ADDRESS(expert) * ADDRESS(UINT32(2) * intermediate) + ADDRESS(first + group)
            source = w + row_of_w * ADDRESS(2 * hidden) + ADDRESS(2) * ADDRESS(column)
            after = ADDRESS(intermediate) * ADDRESS(2 * hidden)
            for s in range(STEPS):
                target = UINT32(stage + UINT32(s * 32 * threads))
                copy_16(target, source + ADDRESS(64 * s))
                copy_16(UINT32(target + UINT32(16 * threads)), source + ADDRESS(64 * s) + after)
            wait_for_copies()
            exists = UINT32(0)
            if group < num_rows:
                exists = UINT32(1)
            row = x + ADDRESS(group) * ADDRESS(x_row_bytes) + ADDRESS(2) * ADDRESS(column)
            sums = products(stage, row, exists, ADDRESS(0))
            for i in range(4):
                partial[(warp * 4 + i) * 32 + lane] = sums[i]
            cuda.syncthreads()
            for number in range(thread, HALF_ROWS * 8, threads):
                line, token = number % HALF_ROWS, number // HALF_ROWS
                if token < num_rows:
                    of_lane = 4 * line + token // 2
                    gate = types.float32(0)
                    up = types.float32(0)
                    for i in range(warps):
                        gate += partial[(4 * i + token % 2) * 32 + of_lane]
                        up += partial[(4 * i + 2 + token % 2) * 32 + of_lane]
                    value = times_up(gate, up)
                    of_token = ids + ADDRESS(token) * ADDRESS(id_row_bytes)
                    for k in range(top_k):
                        found = ptx.load_u32(of_token + ADDRESS(4 * k))
                        if UINT32(found - UINT32(first_expert)) == expert:
                            place = types.int64(token * top_k + k) * intermediate + types.int64(first) + line
                            store(a, place, value)

    return Kernel(
        few_gate_up,
        (*(ADDRESS, UINT32, UINT32, ADDRESS, UINT32, INT32, UINT32), ADDRESS, UINT32, ELEMENTS[torch.bfloat16].pointer),
        threads,
        shared_bytes=STAGED_BYTES * threads + ALIGNMENT,
        hopper_only=True,
        starts_early=True,
        blocks_per_sm=MOST_WARPS // warps,
        key=(hidden, top_k, gating),
    )


@kernel_factory
def few_down_kernel(intermediate: int, top_k: int, out_dtype: torch.dtype) -> Kernel:
    slices = intermediate // SLICE
    warps = top_k * slices
    threads = 32 * warps
    products = few_products(threads, 1)
    element = ELEMENTS[out_dtype]
    store = element.store
    num_partial = ROWS * warps

    def few_down(a, ids, id_row_bytes, first_expert, num_local, weights, w, hidden, out, out_stride):
        partial = cuda.shared.array(num_partial, types.float32)
        base = ptx.shared_address(cuda.shared.array(0, types.uint8))
        thread = UINT32(cuda.threadIdx.x)
        lane, warp = thread & UINT32(31), thread >> UINT32(5)
        token, first = UINT32(cuda.blockIdx.y), UINT32(cuda.blockIdx.x) * UINT32(ROWS)
        k, group = warp // UINT32(slices), lane >> UINT32(2)
        column = UINT32((warp % UINT32(slices)) * UINT32(SLICE) + (lane & UINT32(3)) * UINT32(8))
        stage = ((base + UINT32(ALIGNMENT - 1)) & UINT32(0xFFFFFFFF - (ALIGNMENT - 1))) + thread * UINT32(16)
        # gate_up has waited for the ids before it let this kernel start.
        of_pair = ADDRESS(token) * ADDRESS(id_row_bytes) + ADDRESS(4) * ADDRESS(k)
        expert = UINT32(ptx.load_u32(ids + of_pair) - UINT32(first_expert))
        is_here = expert < num_local
        if is_here:
            row_of_w = ADDRESS(expert) * ADDRESS(hidden) + ADDRESS(first + group)
            source = w + row_of_w * ADDRESS(2 * intermediate) + ADDRESS(2) * ADDRESS(column)
            for s in range(STEPS):
                target = UINT32(stage + UINT32(s * 32 * threads))
                copy_16(target, source + ADDRESS(64 * s))
                copy_16(UINT32(target + UINT32(16 * threads)), source + ADDRESS(64 * s + 16 * intermediate))
        ptx.launch_dependents()
        ptx.wait_for_earlier()
        wait_for_copies()
        low = types.float32(0)
        high = types.float32(0)
        if is_here:
            weight = from_bits(ptx.load_u32(weights + of_pair))
            exists = UINT32(0)
            if group == UINT32(0):
                exists = UINT32(1)
            row = a + (ADDRESS(token) * ADDRESS(top_k) + ADDRESS(k)) * ADDRESS(2 * intermediate)
            sums = products(stage, row + ADDRESS(2) * ADDRESS(column), exists, ADDRESS(0))
            low = weight * sums[0]
            high = weight * sums[2]
        if lane & UINT32(3) == UINT32(0):
            partial[warp * ROWS + group] = low
            partial[warp * ROWS + 8 + group] = high
        cuda.syncthreads()
        if thread < UINT32(ROWS):
            total = types.float32(0)
            for i in range(warps):
                total += partial[i * ROWS + thread]
            store(out, types.int64(token) * out_stride + types.int64(first + thread), total)

    return Kernel(
        few_down,
        (ADDRESS, ADDRESS, UINT32, INT32, UINT32, ADDRESS, ADDRESS, UINT32, element.pointer, INT32),
        threads,
        shared_bytes=STAGED_BYTES * threads + ALIGNMENT,
        hopper_only=True,
        starts_early=True,
        blocks_per_sm=MOST_WARPS // warps,
        key=(intermediate, top_k, out_dtype),
    )


def fits(hidden: int, intermediate: int, top_k: int) -> bool:
    """Do these kernels serve such sizes? A block's weights must fit shared memory."""
    are_slices = hidden % SLICE == 0 and intermediate % SLICE == 0
    return are_slices and max(hidden, top_k * intermediate) // SLICE <= MOST_WARPS


def few_experts(
    stream: Stream,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    first_expert: int,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    a: torch.Tensor,
    out: torch.Tensor,
    gating: str | Gating = "silu",
) -> None:
    """out [T, H] = weighted sums of (activation(gate x) * (up x)) down^T, over the local experts among a row's ids.

    hidden [T, H] bfloat16, 1 <= T <= MOST_ROWS, rows on 16-byte boundaries; ids [T, K] int32 and weights [T, K] float32
    of one row stride; gate_up [E_loc, 2I, H], down [E_loc, H, I]; a: bfloat16 memory for T K I values.
    """
    num_rows, top_k = ids.shape
    num_local, _, intermediate = down.shape
    width = hidden.shape[1]
    assert fits(width, intermediate, top_k) and 1 <= num_rows <= MOST_ROWS, (width, intermediate)
    assert hidden.dtype == gate_up.dtype == down.dtype == a.dtype == torch.bfloat16
    assert gate_up.shape == (num_local, 2 * intermediate, width) and down.shape == (num_local, width, intermediate)
    assert gate_up.is_contiguous() and down.is_contiguous() and gate_up.data_ptr() % 16 == down.data_ptr() % 16 == 0
    assert hidden.stride(1) == 1 and hidden.stride(0) % 8 == 0 and hidden.data_ptr() % 16 == a.data_ptr() % 16 == 0
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32 and ids.stride() == weights.stride()
    assert ids.stride(1) == 1 and a.is_contiguous() and a.numel() >= num_rows * top_k * intermediate
    assert out.shape == hidden.shape and out.stride(1) == 1
    of_ids = ids, 4 * ids.stride(0), first_expert, num_local
    few_gate_up_kernel(width, top_k, gating).launch(
        stream,
        (intermediate // HALF_ROWS, num_rows * top_k),
        *(hidden, 2 * hidden.stride(0), num_rows, *of_ids, gate_up, intermediate, a),
    )
    few_down_kernel(intermediate, top_k, out.dtype).launch(
        stream, (width // ROWS, num_rows), a, *of_ids, weights, down, width, out, out.stride(0)
    )
