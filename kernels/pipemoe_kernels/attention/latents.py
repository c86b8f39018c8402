"""Multi-head latent attention around its products: norms of latents, rotary embedding, keys of all heads.

    rows [T, Wq + C + P]   | queries' | latent C | position P |        one product of the token's row
                             norm       norm       rotate              in place; queries' only if they have a latent
    latents [N, C], positions [N, P]    rows[t]    rows[t]             and kept; other rows stay as they are

    queries [T, Hq, D]             | without a position | P |          a head's P last values are rotated in place
    expanded [S, Hq (D - P + V)]   | key, value of head 0 | ... |      the product of latents
    keys [S, Hq, D]                | key of head 0 | positions[s] | ... |          one position for all heads

Pairs of a rotation and their tables are those of heads.py; all in float32, rounded once. Norms are RMSNorm.

Multi-head latent attention: DeepSeek-V2, arXiv:2405.04434.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipemoe_kernels.attention.format import BLOCK, FORMATS, WIDTH, check_rows, eights
from pipemoe_kernels.attention.heads import INT64_POINTER
from pipemoe_kernels.element import load_vector, store_vector
from pipemoe_kernels.launch.kernel import INT32, WORD_POINTER, Kernel, Stream, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types

add, multiply, scale = eights.add, eights.multiply, eights.scale
swap_pairs, sum_of_squares = eights.swap_pairs, eights.sum_of_squares
ZERO, ONE, MINUS_ONE = np.float32(0.0), np.float32(1.0), np.float32(-1.0)


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Widths. query: of what queries have in a product's row; has_query_norm: whether that is a latent. nope, position,
    value: of a head; rank: of the latent of keys and values.
    """

    query: int
    has_query_norm: bool
    rank: int
    nope: int
    position: int
    value: int
    interleaved: bool

    def lack(self) -> str | None:
        """Why there are no kernels for this shape, or None."""
        widths = self.query, self.rank, self.nope, self.position, self.value
        if any(width % WIDTH for width in widths) or (self.position % (2 * WIDTH) and not self.interleaved):
            return f"widths of latents and heads {widths} are not whole vectors"
        return None


@kernel_factory
def norm_latents_kernel(dtype: torch.dtype, shape: LatentShape, eps: float, threads: int = BLOCK) -> Kernel:
    eight_of, vector_of = FORMATS[dtype].eight_of, FORMATS[dtype].vector_of
    sum_over_warp = eights.sum_over(32)
    num_warps = threads // 32
    has_query, interleaved = shape.has_query_norm, shape.interleaved
    query_vectors, rank_vectors, position_vectors = (w // WIDTH for w in (shape.query, shape.rank, shape.position))
    row_width = query_vectors + rank_vectors
    rotated = position_vectors if interleaved else position_vectors // 2  # threads that rotate
    query_each, rank_each = -(-query_vectors // threads), -(-rank_vectors // threads)
    num_words = 2 * (query_each + rank_each)
    epsilon = np.float32(eps)
    of_query, of_rank = np.float32(1 / shape.query), np.float32(1 / shape.rank)

    def norm_latents(
        rows, row_vectors, query_weight, rank_weight, cos, cos_vectors, sin, sin_vectors, places, latents, positions
    ):
        partial = cuda.shared.array((2, num_warps), types.float32)
        token = types.int64(cuda.blockIdx.x)
        thread = types.int64(cuda.threadIdx.x)
        start = token * row_vectors
        place = places[token]
        words = cuda.local.array(num_words, types.uint64)
        query_total, rank_total = ZERO, ZERO
        if has_query:
            for i in range(query_each):
                vector = i * threads + thread
                if vector < query_vectors:
                    found = load_vector(rows, start + vector)
                    words[2 * i] = found[0]
                    words[2 * i + 1] = found[1]
                    query_total += sum_of_squares(eight_of(found))
        for i in range(rank_each):
            vector = i * threads + thread
            if vector < rank_vectors:
                found = load_vector(rows, start + query_vectors + vector)
                words[2 * (query_each + i)] = found[0]
                words[2 * (query_each + i) + 1] = found[1]
                rank_total += sum_of_squares(eight_of(found))
        if has_query:
            query_total = sum_over_warp(query_total)
        rank_total = sum_over_warp(rank_total)
        if num_warps > 1:
            if thread % 32 == 0:
                partial[0, thread // 32] = query_total
                partial[1, thread // 32] = rank_total
            cuda.syncthreads()
            query_total, rank_total = ZERO, ZERO
            for i in range(num_warps):
                query_total += partial[0, i]
                rank_total += partial[1, i]
        if has_query:
            factor = ONE / math.sqrt(query_total * of_query + epsilon)
            for i in range(query_each):
                vector = i * threads + thread
                if vector < query_vectors:
                    values = scale(eight_of((words[2 * i], words[2 * i + 1])), factor)
                    found = vector_of(multiply(values, eight_of(load_vector(query_weight, vector))))
                    store_vector(rows, start + vector, found)
        factor = ONE / math.sqrt(rank_total * of_rank + epsilon)
        for i in range(rank_each):
            vector = i * threads + thread
            if vector < rank_vectors:
                first = 2 * (query_each + i)
                values = scale(eight_of((words[first], words[first + 1])), factor)
                found = vector_of(multiply(values, eight_of(load_vector(rank_weight, vector))))
                store_vector(rows, start + query_vectors + vector, found)
                store_vector(latents, place * rank_vectors + vector, found)
        for vector in range(thread, rotated, threads):
            x = eight_of(load_vector(rows, start + row_width + vector))
            c = eight_of(load_vector(cos, token * cos_vectors + vector))
            s = eight_of(load_vector(sin, token * sin_vectors + vector))
            if interleaved:
                found = vector_of(add(multiply(x, c), multiply(swap_pairs(x), s)))
            else:
                y = eight_of(load_vector(rows, start + row_width + rotated + vector))
                found = vector_of(add(multiply(x, c), scale(multiply(y, s), MINUS_ONE)))
                other = vector_of(add(multiply(y, c), multiply(x, s)))
                store_vector(rows, start + row_width + rotated + vector, other)
                store_vector(positions, place * position_vectors + rotated + vector, other)
            store_vector(rows, start + row_width + vector, found)
            store_vector(positions, place * position_vectors + vector, found)

    return Kernel(
        norm_latents,
        (
            *(WORD_POINTER, INT32, WORD_POINTER, WORD_POINTER, WORD_POINTER, INT32, WORD_POINTER, INT32),
            *(INT64_POINTER, WORD_POINTER, WORD_POINTER),
        ),
        threads,
        key=(dtype, shape, eps, threads),
    )


def norm_latents(
    stream: Stream,
    rows: torch.Tensor,
    query_weight: torch.Tensor | None,
    rank_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    places: torch.Tensor,
    latents: torch.Tensor,
    positions: torch.Tensor,
    shape: LatentShape,
    kernel: Kernel | None = None,
) -> None:
    """rows [T, query + rank + position], changed in place; query_weight [query] if queries have a latent, rank_weight
    [rank]; cos, sin: see heads.py; places [T] int64; latents [N, rank] and positions [N, position]. T may be 0.
    """
    check_rows(rows, cos, sin)
    assert shape.lack() is None and rows.shape[1] == shape.query + shape.rank + shape.position, (rows.shape, shape)
    assert (query_weight is not None) == shape.has_query_norm
    for weight, width in ((query_weight, shape.query), (rank_weight, shape.rank)):
        assert weight is None or (weight.shape == (width,) and weight.dtype == rows.dtype and weight.is_contiguous())
    assert cos.shape == sin.shape == (len(rows), shape.position // (1 if shape.interleaved else 2)), cos.shape
    assert places.dtype == torch.int64 and places.shape == (len(rows),) and places.is_contiguous()
    for kept, width in ((latents, shape.rank), (positions, shape.position)):
        assert kept.shape[1] == width and kept.is_contiguous() and kept.dtype == rows.dtype, kept.shape
    if len(rows) == 0:
        return
    kernel = kernel or norm_latents_kernel(rows.dtype, shape, eps)
    kernel.launch(
        stream,
        (len(rows), 1),
        rows,
        rows.stride(0) // WIDTH,
        rank_weight if query_weight is None else query_weight,
        rank_weight,
        cos,
        cos.stride(0) // WIDTH,
        sin,
        sin.stride(0) // WIDTH,
        places,
        latents,
        positions,
    )


@kernel_factory
def rotate_queries_kernel(dtype: torch.dtype, shape: LatentShape, threads: int = BLOCK) -> Kernel:
    eight_of, vector_of = FORMATS[dtype].eight_of, FORMATS[dtype].vector_of
    interleaved = shape.interleaved
    nope_vectors, head_vectors = shape.nope // WIDTH, (shape.nope + shape.position) // WIDTH
    each = shape.position // WIDTH // (1 if interleaved else 2)  # threads of a head

    def rotate_queries(queries, row_vectors, num_heads, cos, cos_vectors, sin, sin_vectors):
        token = types.int64(cuda.blockIdx.x)
        for unit in range(cuda.threadIdx.x, num_heads * each, threads):
            head = unit // each
            vector = unit - head * each
            place = token * row_vectors + head * head_vectors + nope_vectors + vector
            x = eight_of(load_vector(queries, place))
            c = eight_of(load_vector(cos, token * cos_vectors + vector))
            s = eight_of(load_vector(sin, token * sin_vectors + vector))
            if interleaved:
                store_vector(queries, place, vector_of(add(multiply(x, c), multiply(swap_pairs(x), s))))
            else:
                y = eight_of(load_vector(queries, place + each))
                store_vector(queries, place, vector_of(add(multiply(x, c), scale(multiply(y, s), MINUS_ONE))))
                store_vector(queries, place + each, vector_of(add(multiply(y, c), multiply(x, s))))

    return Kernel(
        rotate_queries,
        (WORD_POINTER, INT32, INT32, WORD_POINTER, INT32, WORD_POINTER, INT32),
        threads,
        key=(dtype, shape, threads),
    )


def rotate_queries(
    stream: Stream,
    queries: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    shape: LatentShape,
    kernel: Kernel | None = None,
) -> None:
    """queries [T, Hq (nope + position)], changed in place. T may be 0."""
    check_rows(queries, cos, sin)
    num_heads, rest = divmod(queries.shape[1], shape.nope + shape.position)
    assert rest == 0 and shape.lack() is None and cos.dtype == sin.dtype == queries.dtype
    assert cos.shape == sin.shape == (len(queries), shape.position // (1 if shape.interleaved else 2)), cos.shape
    if len(queries) == 0:
        return
    kernel = kernel or rotate_queries_kernel(queries.dtype, shape)
    kernel.launch(
        stream,
        (len(queries), 1),
        queries,
        queries.stride(0) // WIDTH,
        num_heads,
        cos,
        cos.stride(0) // WIDTH,
        sin,
        sin.stride(0) // WIDTH,
    )


@kernel_factory
def join_keys_kernel(shape: LatentShape, threads: int = BLOCK) -> Kernel:
    nope_vectors, head_vectors = shape.nope // WIDTH, (shape.nope + shape.position) // WIDTH
    expanded_vectors = (shape.nope + shape.value) // WIDTH  # of a head

    def join_keys(expanded, row_vectors, positions, position_vectors, num_heads, keys):
        row = types.int64(cuda.blockIdx.x)
        for unit in range(cuda.threadIdx.x, num_heads * head_vectors, threads):
            head = unit // head_vectors
            vector = unit - head * head_vectors
            if vector < nope_vectors:
                found = load_vector(expanded, row * row_vectors + head * expanded_vectors + vector)
            else:
                found = load_vector(positions, row * position_vectors + vector - nope_vectors)
            store_vector(keys, row * num_heads * head_vectors + unit, found)

    return Kernel(
        join_keys,
        (WORD_POINTER, INT32, WORD_POINTER, INT32, INT32, WORD_POINTER),
        threads,
        key=(shape, threads),
    )


def join_keys(
    stream: Stream,
    expanded: torch.Tensor,
    positions: torch.Tensor,
    keys: torch.Tensor,
    shape: LatentShape,
    kernel: Kernel | None = None,
) -> None:
    """expanded [S, Hq (nope + value)] and positions [S, position] -> keys [S, Hq, nope + position]. S may be 0."""
    check_rows(expanded, positions)
    num_heads, rest = divmod(expanded.shape[1], shape.nope + shape.value)
    assert rest == 0 and shape.lack() is None and positions.shape == (len(expanded), shape.position), positions.shape
    assert keys.shape == (len(expanded), num_heads, shape.nope + shape.position) and keys.is_contiguous(), keys.shape
    assert expanded.dtype == positions.dtype == keys.dtype
    if len(expanded) == 0:
        return
    kernel = kernel or join_keys_kernel(shape)
    kernel.launch(
        stream,
        (len(expanded), 1),
        expanded,
        expanded.stride(0) // WIDTH,
        positions,
        positions.stride(0) // WIDTH,
        num_heads,
        keys,
    )
