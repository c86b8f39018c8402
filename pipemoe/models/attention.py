"""Attention over packed sequence pieces, called by transformers' own attention modules.

Registered with transformers' AttentionInterface under the name PACKED; what varies per microbatch arrives in the
keyword argument `packing`, so there is no global state and any number of threads may attend at once.

On CUDA in half precision all pieces are one launch (packed_attention.py). Elsewhere (float32, the host) each piece is
one call of scaled_dot_product_attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pipemoe.models.packed_attention import attend_pieces, serves
from pipemoe.models.packing import Packing

PACKED = "pipemoe_packed"


def register_packed_attention() -> None:
    """Make PACKED known to transformers; repeated calls are fine."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Each piece's queries look, causally, at all tokens of their own sequence so far.

    query [1, Hq, T, D], key [1, Hkv, S, D], value [1, Hkv, S, Dv] with S = packing.num_keys, or all rows of StepKeys;
    Hkv divides Hq. Returns [1, T, Hq, Dv] in query's dtype.
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if query.shape[2] and serves(query.device, query.dtype, head_dim):
        out = attend_pieces(
            query[0].transpose(0, 1),  # [T, Hq, D]
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            scale=scaling,
            window=sliding_window,
            **packing.bounds(),
        )
        return out.unsqueeze(0), None
    if value_dim < head_dim:  # the fused kernels want one head size (MLA: 192 and 128)
        value = F.pad(value, (0, head_dim - value_dim))
    out = _by_piece(query, key, value, packing, scaling, sliding_window)
    return out[..., :value_dim].unsqueeze(0), None


def _by_piece(query, key, value, packing: Packing, scaling: float, window: int | None) -> torch.Tensor:
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda:  # the memory-efficient CUDA kernel knows no grouped heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outs = []
    for index, (piece, span) in enumerate(zip(packing.pieces, packing.spans)):
        masked = piece.start > 0 or (window is not None and piece.stop > window)
        outs.append(
            F.scaled_dot_product_attention(
                query[:, :, span.query_start : span.query_stop],
                key[:, :, span.key_start : span.key_stop],
                value[:, :, span.key_start : span.key_stop],
                attn_mask=packing.mask(index, window) if masked else None,
                is_causal=not masked,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
        )
    if not outs:
        return query[0].transpose(0, 1)
    return outs[0] if len(outs) == 1 else torch.cat(outs)
