"""From the rows of one product to the heads of attention: norms, rotary embedding, and keys and values in their place.

    qkv [T, (Hq + 2 Hkv) D]  | q heads | k heads | v heads |
                               norm      norm
                               rotate    rotate
                               in place    |         |
    keys, values [rows, Hkv, D]          rows[t]   rows[t]        rows of other tokens stay as they are

A head's first `rotary` values are rotated, the rest pass. Pairs are (i, i + rotary / 2), or, interleaved, (2i, 2i + 1):

    cos, sin [T, rotary / 2], interleaved [T, rotary]        rotated: (a cos - b sin, b cos + a sin)

where the interleaved form has each value twice, and the first sine of a pair with its sign changed (see
interleaved_tables). Norms are RMSNorm over the head. A group of neighbouring lanes has a head; all in float32, rounded
once.

Rotary embedding: Su et al., arXiv:2104.09864.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipemoe_kernels.attention.format import (
    BLOCK,
    FORMATS,
    WIDTH,
    check_rows,
    eights,
    launch_dependents,
    wait_for_earlier,
)
from pipemoe_kernels.element import load_vector, store_vector
from pipemoe_kernels.launch.kernel import INT32, WORD_POINTER, Kernel, Stream, is_hopper, kernel_factory
from pipemoe_kernels.numba_cuda import cuda, types

add, multiply, scale = eights.add, eights.multiply, eights.scale
swap_pairs, sum_of_squares = eights.swap_pairs, eights.sum_of_squares
INT64_POINTER = types.CPointer(types.int64)
ZERO, ONE, MINUS_ONE = np.float32(0.0), np.float32(1.0), np.float32(-1.0)


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a kernel of this module is compiled for. eps: of the norms of queries' and keys' heads; None without."""

    head_dim: int
    rotary: int
    interleaved: bool = False
    eps: float | None = None

    def lack(self) -> str | None:
        """Why there is no kernel for this form, or None."""
        step = WIDTH if self.interleaved else 2 * WIDTH
        if self.head_dim % WIDTH or not 0 < self.rotary <= self.head_dim <= 512 or self.rotary % step:
            return f"heads of {self.head_dim} values, {self.rotary} of them rotated, are not whole vectors"
        return None

    @property
    def lanes(self) -> int:
        """Of a head: each has two vectors, a pair of those that are rotated, or fewer."""
        return max(1, 1 << (-(-self.head_dim // (2 * WIDTH)) - 1).bit_length())


@kernel_factory
def heads_kernel(dtype: torch.dtype, form: HeadForm, threads: int = BLOCK, on_hopper: bool = False) -> Kernel:
    """on_hopper: it starts early, as only Hopper's can."""
    eight_of, vector_of = FORMATS[dtype].eight_of, FORMATS[dtype].vector_of
    lanes, interleaved, has_norm = form.lanes, form.interleaved, form.eps is not None
    head_vectors, rotary_vectors = form.head_dim // WIDTH, form.rotary // WIDTH
    # In the other form a lane's two vectors are `half` apart; vectors behind the rotated ones are taken in their order.
    half = rotary_vectors // 2
    epsilon, of_head = np.float32(form.eps or 0.0), np.float32(1 / form.head_dim)
    sum_over_head = eights.sum_over(lanes)
    heads_each = threads // lanes
    passes = -(-head_vectors // (2 * lanes))
    num_vectors, num_words = 2 * passes, 4 * passes  # of a lane

    def place_heads(
        qkv,
        row_vectors,
        num_tokens,
        num_query,
        num_key,
        cos,
        cos_vectors,
        sin,
        sin_vectors,
        query_weight,
        key_weight,
        rows,
        keys,
        key_vectors,
        values,
        value_vectors,
    ):
        if on_hopper:
            launch_dependents()
            wait_for_earlier()
        num_heads = num_query + 2 * num_key
        unit = types.int64(cuda.blockIdx.x) * heads_each + cuda.threadIdx.x // lanes
        lane = cuda.threadIdx.x % lanes
        token = unit // num_heads
        head = types.int32(unit - token * num_heads)
        exists = token < num_tokens
        is_value = head >= num_query + num_key
        start = token * row_vectors + types.int64(head) * head_vectors
        first = cuda.local.array(num_vectors, types.int32)
        words = cuda.local.array(num_words, types.uint64)
        total = ZERO
        for i in range(passes):
            # the two vectors of this lane and pass; -1: none
            low = i * lanes + lane
            if interleaved:
                low *= 2
                high = low + 1
            elif low < half:
                high = low + half
            else:
                low = rotary_vectors + 2 * (low - half)
                high = low + 1
            first[2 * i] = low if low < head_vectors else -1
            first[2 * i + 1] = high if high < head_vectors else -1
            for j in range(2):
                if exists and first[2 * i + j] >= 0:
                    found = load_vector(qkv, start + first[2 * i + j])
                    words[4 * i + 2 * j] = found[0]
                    words[4 * i + 2 * j + 1] = found[1]
                    if has_norm:
                        total += sum_of_squares(eight_of(found))
        factor = ONE
        if has_norm:
            total = sum_over_head(total)
            factor = ONE / math.sqrt(total * of_head + epsilon)
        if exists:
            target = start
            is_key = head >= num_query
            if is_key:
                row = rows[token]
                if is_value:
                    target = row * value_vectors + types.int64(head - num_query - num_key) * head_vectors
                else:
                    target = row * key_vectors + types.int64(head - num_query) * head_vectors
            for i in range(passes):
                low, high = first[2 * i], first[2 * i + 1]
                if low >= 0:
                    a = (words[4 * i], words[4 * i + 1])
                    b = a
                    if high >= 0:
                        b = (words[4 * i + 2], words[4 * i + 3])
                    if is_value:
                        store_vector(values, target + low, a)
                        if high >= 0:
                            store_vector(values, target + high, b)
                    else:
                        x, y = eight_of(a), eight_of(b)
                        if has_norm:
                            x, y = scale(x, factor), scale(y, factor)
                            if is_key:
                                x = multiply(x, eight_of(load_vector(key_weight, low)))
                                if high >= 0:
                                    y = multiply(y, eight_of(load_vector(key_weight, high)))
                            else:
                                x = multiply(x, eight_of(load_vector(query_weight, low)))
                                if high >= 0:
                                    y = multiply(y, eight_of(load_vector(query_weight, high)))
                        if low < rotary_vectors:
                            c = eight_of(load_vector(cos, token * cos_vectors + low))
                            s = eight_of(load_vector(sin, token * sin_vectors + low))
                            if interleaved:
                                x = add(multiply(x, c), multiply(swap_pairs(x), s))
                                if high < rotary_vectors and high >= 0:
                                    c = eight_of(load_vector(cos, token * cos_vectors + high))
                                    s = eight_of(load_vector(sin, token * sin_vectors + high))
                                    y = add(multiply(y, c), multiply(swap_pairs(y), s))
                            else:
                                rotated = add(multiply(x, c), scale(multiply(y, s), MINUS_ONE))
                                y = add(multiply(y, c), multiply(x, s))
                                x = rotated
                        if is_key:
                            store_vector(keys, target + low, vector_of(x))
                            if high >= 0:
                                store_vector(keys, target + high, vector_of(y))
                        else:
                            store_vector(qkv, target + low, vector_of(x))
                            if high >= 0:
                                store_vector(qkv, target + high, vector_of(y))

    return Kernel(
        place_heads,
        (
            *(WORD_POINTER, INT32, INT32, INT32, INT32, WORD_POINTER, INT32, WORD_POINTER, INT32),
            *(WORD_POINTER, WORD_POINTER, INT64_POINTER, WORD_POINTER, INT32, WORD_POINTER, INT32),
        ),
        threads,
        hopper_only=on_hopper,
        starts_early=on_hopper,
        key=(dtype, form, threads, on_hopper),
    )


def interleaved_tables(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [T, rotary / 2] of the pairs as the interleaved form reads them: [T, rotary]."""
    return cos.repeat_interleave(2, dim=1), torch.stack((-sin, sin), dim=2).flatten(1)


def place_heads(
    stream: Stream,
    qkv: torch.Tensor,
    num_query: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    form: HeadForm,
    kernel: Kernel | None = None,
) -> None:
    """qkv [T, (Hq + 2 Hkv) D], of which the `num_query` query heads change in place; cos, sin: see the module; norms:
    weights [D] of queries and keys, if the form has them; rows [T] int64, all different but for rows that nobody reads;
    keys, values [rows, Hkv, D]. T may be 0.
    """
    num_tokens, num_key = len(qkv), keys.shape[1]
    check_rows(qkv, cos, sin)
    assert form.lack() is None and keys.shape[1:] == values.shape[1:] == (num_key, form.head_dim), (keys.shape, form)
    assert qkv.shape[1] == (num_query + 2 * num_key) * form.head_dim, (qkv.shape, num_query, num_key, form)
    assert qkv.dtype == keys.dtype == values.dtype == cos.dtype == sin.dtype
    assert cos.shape == sin.shape == (num_tokens, form.rotary if form.interleaved else form.rotary // 2), cos.shape
    assert rows.dtype == torch.int64 and rows.shape == (num_tokens,) and rows.is_contiguous()
    check_rows(keys.flatten(1), values.flatten(1))
    assert (norms is None) == (form.eps is None)
    for weight in norms or ():
        assert weight.shape == (form.head_dim,) and weight.dtype == qkv.dtype and weight.is_contiguous()
    if num_tokens == 0:
        return
    kernel = kernel or heads_kernel(qkv.dtype, form, on_hopper=is_hopper(stream.device_index))
    query_weight, key_weight = norms or (cos, cos)
    kernel.launch(
        stream,
        (-(-num_tokens * (num_query + 2 * num_key) * form.lanes // kernel.threads), 1),
        qkv,
        qkv.stride(0) // WIDTH,
        num_tokens,
        num_query,
        num_key,
        cos,
        cos.stride(0) // WIDTH,
        sin,
        sin.stride(0) // WIDTH,
        query_weight,
        key_weight,
        rows,
        keys,
        keys.stride(0) // WIDTH,
        values,
        values.stride(0) // WIDTH,
    )
