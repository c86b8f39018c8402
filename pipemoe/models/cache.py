"""Keys and values that live for one step, only for sequences that are cut over several microbatches.

    microbatch 0:  | seq 0, whole | seq 1 [0, 90) |      seq 0: nothing is kept; seq 1: its 90 rows are kept, per layer
    microbatch 1:  | seq 1 [90, 140) | seq 2, whole |    seq 1's kept rows are put in front of its new ones

For multi-head latent attention the kept rows are what transformers caches there: the compressed latents.

On CUDA the microbatches of a sequence may run on different streams; the caller orders them by events, layer by layer.
Kept rows stay referenced until the StepCache itself is freed, which the caller does after the step's last event. If
they were dropped earlier, the stream that made them could reuse their memory while another still reads it.
"""

from __future__ import annotations

import torch

from pipemoe.errors import InputError
from pipemoe.models.packing import Packing


class StepCache:
    """Kept (key, value) rows by layer and sequence."""

    begins = None  # rows have no places of their own, as in StepKeys

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def of(self, packing: Packing) -> MicrobatchCache:
        """The `past_key_values` of one microbatch."""
        return MicrobatchCache(self, packing)

    def earlier(self, layer: int, sequence: int, num_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows [1, heads, n_i, D] of the first `num_tokens` tokens, in order. InputError if any is missing."""
        rows = self._rows.get((layer, sequence), []) if num_tokens else []
        seen = sum(key.shape[2] for key, _ in rows)
        if seen != num_tokens:
            raise InputError(
                f"decoder layer {layer}: a piece of sequence {sequence} starts at token {num_tokens}, but {seen} "
                "earlier tokens have passed this layer; attend the earlier pieces of a sequence first"
            )
        return rows

    def keep(self, layer: int, sequence: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the next rows of a sequence."""
        self._rows.setdefault((layer, sequence), []).append((key, value))

    def drop(self, sequence: int) -> None:
        """Forget a sequence. Only once no microbatch needs it any more."""
        for layer, kept in list(self._rows):
            if kept == sequence:
                del self._rows[layer, kept]

    @property
    def num_bytes(self) -> int:
        """Bytes of all kept rows."""
        return sum(t.nbytes for rows in list(self._rows.values()) for pair in rows for t in pair)


class MicrobatchCache:
    """What transformers' attention modules see as `past_key_values`: the StepCache through one microbatch's pieces."""

    def __init__(self, step_cache: StepCache, packing: Packing) -> None:
        self._step_cache = step_cache
        self._packing = packing
        self._touches_cache = any(p.start > 0 or p.stop < p.length for p in packing.pieces)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rows that a later microbatch needs, and return all rows that this one's queries need.

        key, value: [1, heads, T, D] of the microbatch. Returns [1, heads, packing.num_keys, D], piece after piece, each
        with its sequence's earlier tokens in front. Without cut sequences the arguments come back as they are.
        """
        if not self._touches_cache:
            return key, value
        packing = self._packing
        keys, values = [], []
        for piece, span in zip(packing.pieces, packing.spans):
            rows = slice(span.query_start, span.query_stop)
            new_key, new_value = key[:, :, rows], value[:, :, rows]
            earlier = self._step_cache.earlier(layer_idx, piece.sequence, piece.start)
            keys += [k for k, _ in earlier] + [new_key]
            values += [v for _, v in earlier] + [new_value]
            if piece.stop < piece.length:
                if len(packing.pieces) > 1:  # a view would hold its neighbours' rows too
                    new_key, new_value = new_key.clone(), new_value.clone()
                self._step_cache.keep(layer_idx, piece.sequence, new_key, new_value)
        if packing.starts_fresh:
            return key, value
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)
