"""Index on Hopper: portable.py's result and the token of each place, in one launch for few pairs, else in two.

    ids [n, K]      offsets [E_loc]        positions [n, K]     tokens [pairs]
      7  2            2 2 2 2 2 4            2  0                 0 1 | 0 2
     -1  2    ->      (end of each      ->  -1  1                (expert 2 | expert 7)
      9  7             expert 2..7)         -1  3

    count_pairs   block_counts [blocks, E_loc]   how many pairs of each expert every block of place_pairs has
    place_pairs   all the rest; alone if one block does

Every warp has a run of neighbouring pairs, takes 32 at a time, and counts them by expert. Sums over the warps of a
block, the blocks, and the experts turn counts into starts. A second pass over the pairs writes their positions, in
ascending order of token, then of k. Lanes with the same expert find one another by a vote on each bit of its number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipemoe_kernels.launch.kernel import INT32, INT32_POINTER, UINT32, Kernel, Stream, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types
from pipemoe_kernels.ptx import hopper as ptx

MAX_EXPERTS = 512
THREADS = 1024
WARPS = THREADS // 32
PITCH = WARPS + 1  # between experts' counts: neither all warps nor all experts then meet in one bank
MAX_BLOCKS = 32  # one for each lane of the warp that sums over them
PAIRS_OF_A_BLOCK = 4096
NOT_LOCAL = 0xFFFFFFFF
BATCH = 4  # groups whose ids a warp loads at once


@dataclass(frozen=True)
class IndexKernels:
    """For one K: `alone` for one block, or `count` and then `place`."""

    alone: Kernel
    count: Kernel
    place: Kernel


@cuda.jit(device=True, inline="always")
def groups_of_warp(num_pairs, block, num_blocks, warp):
    """First and end of a warp's groups of 32 pairs."""
    num_groups = (num_pairs + 31) // 32
    each = UINT32(num_groups + num_blocks * WARPS - 1) // UINT32(num_blocks * WARPS)
    first = (block * WARPS + warp) * each
    return first, min(first + each, num_groups)


@cuda.jit(device=True, inline="always")
def sum_over_lanes(value):
    """Sum of the values of all lanes up to this one."""
    distance = 1
    while distance < 32:
        value = UINT32(value + ptx.from_lane_below(value, distance))
        distance *= 2
    return value


@kernel_factory
def index_kernels(top_k: int, on_hopper: bool = True) -> IndexKernels:
    """on_hopper: kernels that start early, as only Hopper's can; else the same kernels for sm_80 and newer."""

    @cuda.jit(device=True, inline="always")
    def expert_of(ids, row_stride, first_expert, num_pairs, group, last, lane):
        """Local expert of a lane's pair of a group; at least num_local if the expert is not local."""
        pair = UINT32(group * 32 + lane)
        expert = UINT32(NOT_LOCAL)
        if group < last and pair < num_pairs:
            token = UINT32(pair // UINT32(top_k))
            expert = UINT32(ids[types.int64(token) * row_stride + UINT32(pair - token * top_k)] - first_expert)
        return expert

    def count_pairs(ids, row_stride, first_expert, num_local, num_pairs, block_counts):
        if on_hopper:
            ptx.launch_dependents()
        counts = cuda.shared.array(MAX_EXPERTS, types.int32)
        thread = cuda.threadIdx.x
        lane = thread % 32
        for i in range(thread, num_local, THREADS):
            counts[i] = 0
        cuda.syncthreads()
        first, last = groups_of_warp(num_pairs, cuda.blockIdx.x, cuda.gridDim.x, thread // 32)
        experts = cuda.local.array(BATCH, types.uint32)
        for batch in range(first, last, BATCH):
            for i in range(BATCH):
                experts[i] = expert_of(ids, row_stride, first_expert, num_pairs, batch + i, last, lane)
            for i in range(BATCH):
                if experts[i] < num_local:
                    cuda.atomic.add(counts, types.int64(experts[i]), 1)
        cuda.syncthreads()
        for i in range(thread, num_local, THREADS):
            block_counts[cuda.blockIdx.x * num_local + i] = counts[i]

    pairs = (INT32_POINTER, *[INT32] * 4, INT32_POINTER)

    def placing(is_alone: bool) -> Kernel:
        def place_pairs(ids, row_stride, first_expert, num_local, num_pairs, block_counts, offsets, positions, tokens):
            counts = cuda.shared.array(0, types.int32)  # [E_loc, PITCH]
            starts = counts[PITCH * num_local :]  # [E_loc]: of this block's pairs
            totals = counts[(PITCH + 1) * num_local :]  # [E_loc]
            thread = cuda.threadIdx.x
            lane = thread % 32
            warp = thread // 32
            block = 0 if is_alone else cuda.blockIdx.x
            num_blocks = 1 if is_alone else cuda.gridDim.x
            before_me = ptx.lanes_before()
            for i in range(thread, PITCH * num_local, THREADS):
                counts[i] = 0
            cuda.syncthreads()
            first, last = groups_of_warp(num_pairs, block, num_blocks, warp)
            experts = cuda.local.array(BATCH, types.uint32)
            for batch in range(first, last, BATCH):
                for i in range(BATCH):
                    experts[i] = expert_of(ids, row_stride, first_expert, num_pairs, batch + i, last, lane)
                for i in range(BATCH):
                    if experts[i] < num_local:
                        cuda.atomic.add(counts, types.int64(experts[i]) * PITCH + warp, 1)
            cuda.syncthreads()

            if on_hopper:
                if not is_alone:
                    ptx.wait_for_earlier()
                ptx.launch_dependents()
            for expert in range(warp, num_local, WARPS):
                count = UINT32(counts[expert * PITCH + lane])
                total = sum_over_lanes(count)
                counts[expert * PITCH + lane] = total - count
                start = UINT32(0)
                if not is_alone:
                    count = UINT32(0)
                    if lane < num_blocks:
                        count = ptx.load_u32(ptx.element_address(block_counts, lane * num_local + expert))
                    total = sum_over_lanes(count)
                    start = ptx.from_lane(UINT32(total - count), block)
                if lane == 31:
                    starts[expert] = start
                    totals[expert] = total
            cuda.syncthreads()

            if warp == 0:
                carry = UINT32(0)
                for base in range(0, num_local, 32):
                    expert = base + lane
                    count = UINT32(0)
                    if expert < num_local:
                        count = UINT32(totals[expert])
                    end = UINT32(sum_over_lanes(count) + carry)
                    if expert < num_local:
                        starts[expert] += end - count
                        if block == 0:
                            offsets[expert] = end
                    carry = ptx.from_lane(end, 31)
            cuda.syncthreads()

            for batch in range(first, last, BATCH):
                for i in range(BATCH):
                    experts[i] = expert_of(ids, row_stride, first_expert, num_pairs, batch + i, last, lane)
                for i in range(BATCH):
                    expert = experts[i]
                    same = ptx.lanes_with(1 if expert < num_local else 0)
                    if same != 0:
                        bit = UINT32(1)
                        while bit < num_local:
                            has_bit = ptx.lanes_with(expert & bit)
                            same = same & (has_bit if expert & bit else UINT32(~has_bit))
                            bit = UINT32(bit << UINT32(1))
                    pair = UINT32((batch + i) * 32 + lane)
                    position = -1
                    if expert < num_local:
                        cell = types.int64(expert) * PITCH + warp
                        position = starts[expert] + counts[cell] + cuda.popc(UINT32(same & before_me))
                        tokens[position] = UINT32(pair // UINT32(top_k))
                    cuda.syncwarp()
                    if expert < num_local and same & before_me == 0:
                        counts[cell] += cuda.popc(UINT32(same))
                    cuda.syncwarp()
                    if batch + i < last and pair < num_pairs:
                        positions[pair] = position

        return Kernel(
            place_pairs,
            (*pairs, *[INT32_POINTER] * 3),
            THREADS,
            shared_bytes=4 * (PITCH + 2) * MAX_EXPERTS,
            hopper_only=on_hopper,
            starts_early=on_hopper and not is_alone,
            key=(top_k, is_alone, on_hopper),
        )

    count = Kernel(count_pairs, pairs, THREADS, hopper_only=on_hopper, key=(top_k, on_hopper))
    return IndexKernels(placing(True), count, placing(False))


class PackedIndex:
    """index_local_pairs, ready for ids of one layout and for as many rows as `positions` has."""

    def __init__(
        self,
        device_index: int,
        ids: torch.Tensor,
        first_expert: int,
        num_local: int,
        block_counts: torch.Tensor,
        offsets: torch.Tensor,
        positions: torch.Tensor,
        tokens: torch.Tensor,
        *,
        on_hopper: bool = True,
    ):
        max_rows, top_k = positions.shape
        assert 1 <= num_local <= MAX_EXPERTS and 1 <= max_rows * top_k < 2**31 - 32, (num_local, positions.shape)
        assert ids.dtype == offsets.dtype == positions.dtype == tokens.dtype == block_counts.dtype == torch.int32
        assert ids.shape[1] == top_k and (ids.stride(1) == 1 or top_k == 1), (ids.shape, ids.stride())
        assert offsets.is_contiguous() and offsets.numel() >= num_local
        assert positions.is_contiguous()
        assert tokens.is_contiguous() and tokens.numel() >= max_rows * top_k
        assert block_counts.is_contiguous() and block_counts.numel() >= MAX_BLOCKS * num_local
        kernels = index_kernels(top_k, on_hopper)
        pairs = (ids, ids.stride(0), first_expert, num_local, 0, block_counts)
        self._alone = kernels.alone.pack(device_index, *pairs, offsets, positions, tokens)
        self._several = [
            kernels.count.pack(device_index, *pairs),
            kernels.place.pack(device_index, *pairs, offsets, positions, tokens),
        ]
        self._ids, self._num_pairs = kernels.alone.index_of("ids"), kernels.alone.index_of("num_pairs")
        self._max_rows, self._top_k = max_rows, top_k

    def __call__(self, stream: int, ids: int, num_rows: int) -> None:
        """Enqueue on a stream's handle, for num_rows >= 1 rows with ids at that address."""
        assert 1 <= num_rows <= self._max_rows, (num_rows, self._max_rows)
        num_pairs = num_rows * self._top_k
        num_blocks = min(MAX_BLOCKS, -(-num_pairs // PAIRS_OF_A_BLOCK))
        for launch in (self._alone,) if num_blocks == 1 else self._several:
            launch.values[self._ids] = ids
            launch.values[self._num_pairs] = num_pairs
            launch(stream, num_blocks)


def index_local_pairs(
    stream: Stream,
    ids: torch.Tensor,
    first_expert: int,
    num_local: int,
    block_counts: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    *,
    on_hopper: bool = True,
) -> None:
    """ids [n, K] int32, rows strided, n >= 1 -> offsets [E_loc], positions [n, K] (-1: not local), tokens [>= pairs],
    all int32.

    block_counts: int32 workspace of MAX_BLOCKS * E_loc. tokens stays as it is behind the last pair's place.
    """
    assert positions.shape == ids.shape and offsets.numel() == num_local, (positions.shape, ids.shape, offsets.shape)
    index = PackedIndex(
        stream.device_index,
        ids,
        first_expert,
        num_local,
        block_counts,
        offsets,
        positions,
        tokens,
        on_hopper=on_hopper,
    )
    index(stream.handle, ids.data_ptr(), len(ids))
