"""The parts of a fused decoder layer that read and write the residual: norms and attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.models.packed_attention import attend_pieces
from pipemoe.models.products import FINE_ROWS, MOST_ROWS, add_product, fuse, product

if TYPE_CHECKING:
    from pipemoe.models.attention_form import AttentionForm
    from pipemoe.models.packing import Packing
    from pipemoe.models.step_keys import KeysOfMicrobatch
    from pipemoe_kernels.attention.latents import LatentShape
    from pipemoe_kernels.placed_rows import PlacedRows

Norm = Callable[..., None]  # hidden [T, H], sums [T, H] or None, out [T, H] or None, placed rows or None


def norm_of(module: Any) -> Norm:
    """A module's RMSNorm as one kernel, see pipemoe_kernels.attention.norm."""
    return partial(_norm, module.weight, eps_of(module))


def eps_of(module: Any) -> float:
    """Of an RMSNorm of torch, or of transformers."""
    eps = module.eps if isinstance(module, torch.nn.RMSNorm) else module.variance_epsilon
    assert isinstance(eps, float)
    return eps


def _norm(
    weight: torch.Tensor,
    eps: float,
    hidden: torch.Tensor,
    sums: torch.Tensor | None,
    out: torch.Tensor | None,
    placed: PlacedRows | None = None,
) -> None:
    from pipemoe_kernels.attention.norm import norm_rows
    from pipemoe_kernels.launch.kernel import Stream

    norm_rows(Stream.current(hidden.device), hidden, sums, weight, eps, out, placed)


class HeadAttention:
    """One layer's attention with heads of queries, keys and values that are projected from the row."""

    def __init__(self, form: AttentionForm, module: Any, layer: int) -> None:
        """module: transformers', whose weights are shared (see fuse). layer: of the decoder."""
        from pipemoe_kernels.attention.heads import HeadForm

        self._form, self._layer, self._scaling = form, layer, module.scaling
        self._weight, self._bias = fuse([module.q_proj, module.k_proj, module.v_proj])
        self._out, self._out_bias = module.o_proj.weight, module.o_proj.bias
        self._norms, eps = None, None
        if form.head_norms:
            self._norms, eps = (module.q_norm.weight, module.k_norm.weight), eps_of(module.q_norm)
        self._heads = HeadForm(form.head_dim, form.rotary, form.interleaved, eps)

    def key_sizes(self) -> list[tuple[int, int]]:
        """Heads and their size, of keys and of values."""
        return [(self._form.num_key, self._form.head_dim)] * 2

    def add_to(
        self,
        hidden: torch.Tensor,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        packing: Packing,
        keys: KeysOfMicrobatch,
    ) -> None:
        """Add to hidden [T, H] what attention makes of x [T, H]; keeps the tokens' keys and values in `keys`."""
        from pipemoe_kernels.attention.heads import place_heads
        from pipemoe_kernels.launch.kernel import Stream

        form = self._form
        qkv = product(x, self._weight, self._bias)
        key, value = keys.of_layer(self._layer)
        stream, cos, sin = Stream.current(x.device), rope[0][0], rope[1][0]
        place_heads(stream, qkv, form.num_query, cos, sin, self._norms, keys.rows, key, value, self._heads)
        query = qkv[:, : form.num_query * form.head_dim].unflatten(1, (form.num_query, form.head_dim))
        out = attend_pieces(query, key, value, scale=self._scaling, window=form.window, **packing.bounds())
        add_product(hidden, out, self._out, self._out_bias)


class LatentAttention:
    """One layer's multi-head latent attention; the latents are kept, keys and values are made of them anew."""

    def __init__(self, form: AttentionForm, module: Any, layer: int) -> None:
        """As HeadAttention."""
        self._form, self._layer, self._scaling = form, layer, module.scaling
        self._shape = latent_shape(form)
        has_norm = self._shape.has_query_norm
        self._weight, self._bias = fuse([module.q_a_proj if has_norm else module.q_proj, module.kv_a_proj_with_mqa])
        self._of_query = module.q_b_proj.weight if has_norm else None
        self._query_norm = module.q_a_layernorm.weight if has_norm else None
        self._norm, self._eps = module.kv_a_layernorm.weight, eps_of(module.kv_a_layernorm)
        self._of_latent = module.kv_b_proj.weight  # [Hq (nope + value), rank]
        self._out, self._out_bias = module.o_proj.weight, module.o_proj.bias

    def key_sizes(self) -> list[tuple[int, int]]:
        """Latents, and positions rotated: one head of each."""
        return [(1, self._shape.rank), (1, self._shape.position)]

    def add_to(
        self,
        hidden: torch.Tensor,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        packing: Packing,
        keys: KeysOfMicrobatch,
    ) -> None:
        """As HeadAttention."""
        from pipemoe_kernels.attention.latents import join_keys, norm_latents, rotate_queries
        from pipemoe_kernels.launch.kernel import Stream

        shape, num_heads, head_dim = self._shape, self._form.num_query, self._form.head_dim
        stream, cos, sin = Stream.current(x.device), rope[0][0], rope[1][0]
        rows = product(x, self._weight, self._bias)
        latents, positions = (kept[:, 0] for kept in keys.of_layer(self._layer))
        norms = self._query_norm, self._norm, self._eps
        norm_latents(stream, rows, *norms, cos, sin, keys.rows, latents, positions, shape)
        of_query, own_latents, own_positions = rows.split([shape.query, shape.rank, shape.position], dim=1)
        query = of_query if self._of_query is None else product(of_query, self._of_query, None)
        rotate_queries(stream, query, cos, sin, shape)
        key_offsets, key_lengths, max_key = packing.query_offsets, None, packing.max_query
        if packing.starts_fresh:
            latents, positions = own_latents, own_positions
        else:
            first, last = packing.key_range
            latents, positions = latents[first:last], positions[first:last]
            key_offsets, key_lengths, max_key = packing.key_offsets, packing.key_lengths, packing.max_key
        expanded, key = self._expanded(latents)
        join_keys(stream, expanded, positions, key, shape)
        out = attend_pieces(
            query.unflatten(1, (num_heads, head_dim)),
            key,
            expanded.unflatten(1, (num_heads, -1))[..., shape.nope :],
            packing.query_offsets,
            key_offsets,
            max_query=packing.max_query,
            max_key=max_key,
            scale=self._scaling,
            key_lengths=key_lengths,
            window=self._form.window,
        )
        add_product(hidden, out, self._out, self._out_bias)

    def _expanded(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of latents [K, rank]: values behind the keys' first parts [K, Hq (nope + value)], and room for whole keys."""
        expanded = product(latents, self._of_latent, None)
        return expanded, expanded.new_empty((len(expanded), self._form.num_query, self._form.head_dim))

    def warm_up_keys(self, most: int) -> None:
        """Expand up to `most` latents, in every number of rows that a part of them may have (see row_parts): with
        earlier chunks there are more than a step has tokens. Their memory is then there, too.
        """
        latents = self._of_latent.new_zeros((most, self._shape.rank))
        for count in [*range(FINE_ROWS, min(most, MOST_ROWS) + 1, FINE_ROWS), most]:
            self._expanded(latents[:count])


def latent_shape(form: AttentionForm) -> LatentShape:
    """A form's widths, as the kernels are compiled for."""
    from pipemoe_kernels.attention.latents import LatentShape

    latent = form.latent
    assert latent is not None
    query = latent.query_rank or form.num_query * form.head_dim
    widths = query, latent.query_rank is not None, latent.rank, latent.nope, latent.rope, latent.value
    return LatentShape(*widths, form.interleaved)


def lack_of_kernels(form: AttentionForm) -> str | None:
    """Why no kernels serve a form, or None."""
    from pipemoe_kernels.attention.heads import HeadForm

    if form.latent is not None:
        return latent_shape(form).lack()
    return HeadForm(form.head_dim, form.rotary, form.interleaved).lack()


def attention_of(form: AttentionForm, module: Any, layer: int) -> HeadAttention | LatentAttention:
    """A layer's attention, of transformers' module."""
    return (HeadAttention if form.latent is None else LatentAttention)(form, module, layer)


def rotary_tables(form: AttentionForm, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [1, T, rotary] of transformers, as `add_to` reads them: [1, T, n]."""
    from pipemoe_kernels.attention.heads import interleaved_tables

    cos, sin = (t[0, :, : form.rotary // 2] for t in (cos, sin))
    if form.interleaved:
        cos, sin = interleaved_tables(cos, sin)
    return cos.unsqueeze(0), sin.unsqueeze(0)
