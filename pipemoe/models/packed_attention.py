"""Attention over the packed pieces of a microbatch: on Hopper by our own kernel, elsewhere by torch's flash kernel.

    queries [T, Hq, D]    | piece 0 | piece 1      | piece 2 |       each row looks, causally, at its sequence's keys
    keys [S, Hkv, D]      | piece 0 | earlier of piece 1 | piece 1 | piece 2 |
    values [S, Hkv, Dv]

Both find pieces by offsets in device memory, so that no call depends on their lengths: a CUDA graph that holds one
serves other lengths, and no length costs a set-up of its own (cuDNN builds a plan for each, in 40 to 70 ms).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F

FLASH_MAX_HEAD_DIM = 256


def serves(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Can attend_pieces be called with such queries?"""
    half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= FLASH_MAX_HEAD_DIM


@cache
def _own() -> ModuleType | None:
    """The launches of our kernel; None without numba-cuda."""
    try:
        from pipemoe_kernels.attention import packed
    except ImportError:
        return None
    return packed


def attend_pieces(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    query_offsets: torch.Tensor,
    key_offsets: torch.Tensor,
    *,
    max_query: int,
    max_key: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    window: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed pieces. Returns [T, Hq, Dv] in the queries' dtype, which is `out` if given.

    queries [T, Hq, D], keys [S, Hkv, D], values [S, Hkv, Dv]: float16 or bfloat16 on a GPU, Hkv divides Hq, Dv <= D;
    any strides with adjacent columns. query_offsets, key_offsets [B + 1] int32: where each piece's rows begin.
    key_lengths [B] int32: how many keys each has; None: all up to the next one's. The last query of a piece sees all of
    its keys (and, with a window, only the last `window` of them), the one before it all but the last, and so on.
    max_query, max_key: at least the longest piece's queries and keys. Waits for the device at a model's first call
    only, which must not be one that a graph captures.
    """
    own = _own()
    if own is not None and own.serves(queries, keys, values):
        return own.attend(
            queries,
            keys,
            values,
            query_offsets,
            key_offsets,
            max_key=max_key,
            scale=scale,
            key_lengths=key_lengths,
            window=window,
            out=out,
        )
    value_dim = values.shape[-1]
    if value_dim < queries.shape[-1]:  # the flash kernel wants one head size (MLA: 192 and 128)
        values = F.pad(values, (0, queries.shape[-1] - value_dim))
    found = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        query_offsets,
        key_offsets,
        max_query,
        max_key,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=key_lengths,
    )[0][..., :value_dim]
    return found if out is None else out.copy_(found)
