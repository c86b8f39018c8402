"""What a family states of its attention, so that the fused path can run it without transformers' modules."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LatentForm:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values are computed from a latent row.

    query_rank: width of the queries' latent; None if queries have none. rank: of that of keys and values. A head of
    queries and keys is `nope` values without and `rope` values with a position, one of values is `value` wide.
    """

    query_rank: int | None
    rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """Attention as transformers' modules q_proj, k_proj, v_proj and o_proj, or those of multi-head latent attention,
    compute it, with RMSNorm over a row before.

    rotary: how many values of a head (or of its part with a position) are rotated, the first ones: pairs half of that
    apart or, interleaved, neighbours. head_norms: RMSNorm over each head of queries and of keys, as q_norm and k_norm.
    biased: the projections of the row have a bias. window: how many tokens a query sees, itself included; None: all so
    far.
    """

    num_query: int
    num_key: int
    head_dim: int
    rotary: int
    interleaved: bool = False
    head_norms: bool = False
    biased: bool = False
    window: int | None = None
    latent: LatentForm | None = None
