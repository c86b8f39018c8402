"""Index: from expert ids to the sorted order of the (token, k) pairs that meet a local expert.

    ids [n, K]        offsets [E_loc]        positions [n, K]     sorted order
      7  2              2 2 2 2 2 4            2  0                 0: token 0 (expert 2)
     -1  2      ->      (end of each      ->  -1  1                 1: token 1 (expert 2)
      9  7               expert 2..7)         -1  3                 2: token 0 (expert 7)
                                                                    3: token 2 (expert 7)
Three launches over tiles of pairs (pair p is token p // K, k = p % K):

    count_pairs   tile_counts [tiles, E_loc]: histogram of each tile (integer atomics in shared memory: any order does)
    scan_counts   tile_counts -> first position of each (tile, expert); offsets
    place_pairs   positions: first position + rank within the tile, found by comparing, so that the order is always
                  ascending token, then ascending k

The host knows only n, and nothing synchronises with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from pipemoe_kernels.launch.kernel import INT32, INT32_POINTER, Kernel, Stream
from pipemoe_kernels.numba_cuda import cuda, types

MAX_LOCAL_EXPERTS = 512  # bounded by place_pairs' shared memory: 2 bytes per expert and group


@dataclass(frozen=True)
class IndexKernels:
    """The three kernels for tiles of `tile` pairs, ranked in groups of `group`."""

    tile: int
    count: Kernel
    scan: Kernel
    place: Kernel

    def load(self, device_index: int) -> None:
        for kernel in (self.count, self.scan, self.place):
            kernel.load(device_index)


@cache
def index_kernels(tile: int = 1024, group: int = 32) -> IndexKernels:
    """tile: pairs and threads of a block, at least the number of local experts and a multiple of `group`."""
    num_groups = tile // group
    group_slots = num_groups * MAX_LOCAL_EXPERTS

    def count_pairs(ids, row_stride, first_expert, num_local, num_pairs, top_k, tile_counts):
        counts = cuda.shared.array(MAX_LOCAL_EXPERTS, types.int32)
        thread = cuda.threadIdx.x
        for expert in range(thread, num_local, tile):
            counts[expert] = 0
        cuda.syncthreads()
        pair = cuda.blockIdx.x * tile + thread
        if pair < num_pairs:
            token = pair // top_k
            expert = ids[token * row_stride + pair - token * top_k] - first_expert
            if expert >= 0 and expert < num_local:
                cuda.atomic.add(counts, expert, 1)
        cuda.syncthreads()
        for expert in range(thread, num_local, tile):
            tile_counts[cuda.blockIdx.x * num_local + expert] = counts[expert]

    def scan_counts(num_local, num_tiles, tile_counts, offsets):
        """One block. Thread (segment, expert) owns a run of tiles of one expert."""
        partial = cuda.shared.array(tile, types.int32)
        ends = cuda.shared.array(tile, types.int32)
        thread = cuda.threadIdx.x
        num_segments = tile // num_local
        segment = thread // num_local
        expert = thread - segment * num_local
        tiles_each = (num_tiles + num_segments - 1) // num_segments
        first_tile = min(segment * tiles_each, num_tiles)
        last_tile = min(first_tile + tiles_each, num_tiles)
        if segment >= num_segments:
            last_tile = first_tile
        total = 0
        for t in range(first_tile, last_tile):
            total += tile_counts[t * num_local + expert]
        partial[thread] = total
        cuda.syncthreads()
        total = 0
        if thread < num_local:
            for s in range(num_segments):
                count = partial[s * num_local + thread]
                partial[s * num_local + thread] = total
                total += count
        ends[thread] = total
        cuda.syncthreads()
        step = 1
        while step < num_local:
            before = 0
            if thread >= step:
                before = ends[thread - step]
            cuda.syncthreads()
            ends[thread] += before
            cuda.syncthreads()
            step *= 2
        if thread < num_local:
            offsets[thread] = ends[thread]
        if segment < num_segments:
            position = partial[thread]
            if expert > 0:
                position += ends[expert - 1]
            for t in range(first_tile, last_tile):
                count = tile_counts[t * num_local + expert]
                tile_counts[t * num_local + expert] = position
                position += count

    def place_pairs(ids, row_stride, first_expert, num_local, num_pairs, top_k, tile_counts, positions):
        experts = cuda.shared.array(tile, types.int32)
        group_counts = cuda.shared.array(group_slots, types.int16)
        thread = cuda.threadIdx.x
        for i in range(thread, num_groups * num_local, tile):
            group_counts[i] = 0
        pair = cuda.blockIdx.x * tile + thread
        expert = -1
        if pair < num_pairs:
            token = pair // top_k
            named = ids[token * row_stride + pair - token * top_k] - first_expert
            if named >= 0 and named < num_local:
                expert = named
        experts[thread] = expert
        cuda.syncthreads()
        group_index = thread // group
        lane = thread - group_index * group
        before = 0
        after = 0
        if expert >= 0:
            for other in range(group):
                if experts[group_index * group + other] == expert:
                    if other < lane:
                        before += 1
                    if other > lane:
                        after += 1
            if after == 0:
                group_counts[group_index * num_local + expert] = before + 1
        cuda.syncthreads()
        if thread < num_local:
            running = 0
            for g in range(num_groups):
                count = group_counts[g * num_local + thread]
                group_counts[g * num_local + thread] = running
                running += count
        cuda.syncthreads()
        if pair < num_pairs:
            position = -1
            if expert >= 0:
                first = tile_counts[cuda.blockIdx.x * num_local + expert]
                position = first + group_counts[group_index * num_local + expert] + before
            positions[pair] = position

    pairs = (INT32_POINTER, INT32, INT32, INT32, INT32, INT32, INT32_POINTER)
    return IndexKernels(
        tile,
        Kernel(count_pairs, pairs, tile),
        Kernel(scan_counts, (INT32, INT32, INT32_POINTER, INT32_POINTER), tile),
        Kernel(place_pairs, (*pairs, INT32_POINTER), tile),
    )


def num_tiles(num_pairs: int, kernels: IndexKernels) -> int:
    """Rows of `tile_counts` that `num_pairs` pairs need."""
    return -(-num_pairs // kernels.tile)


def index_pairs(
    stream: Stream,
    ids: torch.Tensor,
    first_expert: int,
    num_local: int,
    tile_counts: torch.Tensor,
    offsets: torch.Tensor,
    positions: torch.Tensor,
    kernels: IndexKernels | None = None,
) -> None:
    """ids [n, K] int32, rows strided, n >= 1 -> offsets [num_local] int32 (end of each expert), positions [n, K] int32.

    tile_counts: int32 workspace of at least num_tiles(n * K) * num_local. positions: -1 where the expert is not local.
    """
    kernels = kernels or index_kernels()
    num_rows, top_k = ids.shape
    num_pairs = num_rows * top_k
    tiles = num_tiles(num_pairs, kernels)
    assert 1 <= num_local <= min(MAX_LOCAL_EXPERTS, kernels.tile), num_local
    assert 1 <= num_pairs < 2**31 - kernels.tile, num_pairs
    assert ids.dtype == offsets.dtype == positions.dtype == tile_counts.dtype == torch.int32
    assert ids.stride(1) == 1 or top_k == 1, ids.stride()
    assert offsets.is_contiguous() and offsets.numel() == num_local
    assert positions.is_contiguous() and positions.shape == ids.shape
    assert tile_counts.is_contiguous() and tile_counts.numel() >= tiles * num_local
    pairs = (ids, ids.stride(0), first_expert, num_local, num_pairs, top_k, tile_counts)
    kernels.count.launch(stream, (tiles, 1), *pairs)
    kernels.scan.launch(stream, (1, 1), num_local, tiles, tile_counts, offsets)
    kernels.place.launch(stream, (tiles, 1), *pairs, positions)
