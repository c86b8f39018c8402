"""How sequence pieces lie in the rows of one microbatch.

    rows of the microbatch     | piece 0 | piece 1      | piece 2 |       queries: only the piece's own tokens
    keys and values      | earlier | piece 0 | piece 1      | earlier of 2 | piece 2 |   and its sequence's earlier ones

With StepKeys, keys and values have rows of their own: a piece's begin where its sequence's do, and are `key_lengths`
many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pipemoe.errors import InputError


class Piece(NamedTuple):
    """Tokens [start, stop) of one sequence that is `length` tokens long; `sequence` names it within the step."""

    sequence: int
    start: int
    stop: int
    length: int


class Span(NamedTuple):
    """Where a piece lies: its query rows and its key rows (which begin with the sequence's earlier tokens)."""

    query_start: int
    query_stop: int
    key_start: int
    key_stop: int


class Packing:
    """The layout of one microbatch, with all index tensors on the device; built once, read by every layer.

    One host-to-device copy from pinned memory carries everything, so that nothing synchronises the device.
    Raises InputError for pieces that do not cover the tokens, or token ids outside the vocabulary.
    """

    def __init__(
        self,
        token_ids: torch.Tensor,
        pieces: Sequence[Piece],
        vocab_size: int,
        device: torch.device,
        begins: Sequence[int] | Mapping[int, int] | None = None,
    ) -> None:
        """begins: for each sequence of the step the row of its first key, if keys have rows of their own."""
        self.pieces = [Piece(*piece) for piece in pieces]
        self.num_tokens = len(token_ids)
        _check(token_ids, self.pieces, vocab_size)
        self.spans = _spans(self.pieces)
        self.num_keys = self.spans[-1].key_stop if self.spans else 0
        self.starts_fresh = all(piece.start == 0 for piece in self.pieces)
        self.max_query = max((p.stop - p.start for p in self.pieces), default=0)
        self.max_key = max((p.stop for p in self.pieces), default=0)
        positions = [np.arange(p.start, p.stop) for p in self.pieces]
        ends = [s.query_stop - 1 for p, s in zip(self.pieces, self.spans) if p.stop == p.length]
        parts = [
            token_ids.numpy(),
            np.concatenate(positions) if positions else np.empty(0),
            np.asarray(ends),
            np.asarray([0, *(s.query_stop for s in self.spans)]),
            *_key_parts(self.pieces, self.spans, positions, begins),
        ]
        packed = torch.from_numpy(np.concatenate([part.astype(np.int32) for part in parts]))
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        self.num_ends = len(ends)
        split = packed.split([len(part) for part in parts])  # all int32
        # offsets [num_pieces + 1]
        self.token_ids, self.positions, self.end_rows, self.query_offsets, self.key_offsets = split[:5]
        # [num_pieces], [T]
        self.key_lengths: torch.Tensor | None = None
        self.key_rows: torch.Tensor | None = None
        self.key_range = 0, 0  # of rows: all that the pieces read, from the first to behind the last
        if begins is not None:
            self.key_range = (
                min((begins[p.sequence] for p in self.pieces), default=0),
                max((begins[p.sequence] + p.stop for p in self.pieces), default=0),
            )
            self.key_lengths, self.key_rows = split[5], split[6].long()
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def bounds(self) -> dict[str, Any]:
        """Where the pieces' queries and keys lie, as attend_pieces takes it."""
        names = ("query_offsets", "key_offsets", "key_lengths", "max_query", "max_key")
        return {name: getattr(self, name) for name in names}

    def mask(self, index: int, window: int | None) -> torch.Tensor:
        """Boolean mask [queries, keys] of piece `index`: True where the query may look; made once, then kept."""
        if (index, window) not in self._masks:
            piece, device = self.pieces[index], self.token_ids.device
            mask = torch.ones(piece.stop - piece.start, piece.stop, dtype=torch.bool, device=device).tril_(piece.start)
            if window is not None:
                mask = mask.triu_(piece.start - window + 1)
            self._masks[index, window] = mask
        return self._masks[index, window]


def _key_parts(
    pieces: Sequence[Piece],
    spans: Sequence[Span],
    positions: Sequence[np.ndarray],
    begins: Sequence[int] | Mapping[int, int] | None,
) -> list[np.ndarray]:
    """Offsets of the pieces' keys. If keys have rows of their own: how many each piece reads, and where its own go."""
    if begins is None:
        return [np.asarray([0, *(s.key_stop for s in spans)])]
    first = [begins[p.sequence] for p in pieces]
    last = first[-1] + pieces[-1].stop if pieces else 0
    rows = [begin + of_piece for begin, of_piece in zip(first, positions)]
    return [
        np.asarray([*first, last]),
        np.asarray([p.stop for p in pieces]),
        np.concatenate(rows) if rows else np.empty(0),
    ]


def _spans(pieces: Sequence[Piece]) -> list[Span]:
    spans, query, key = [], 0, 0
    for piece in pieces:
        spans.append(Span(query, query + piece.stop - piece.start, key, key + piece.stop))
        query, key = spans[-1].query_stop, spans[-1].key_stop
    return spans


def _check(token_ids: torch.Tensor, pieces: Sequence[Piece], vocab_size: int) -> None:
    if token_ids.dim() != 1 or token_ids.device.type != "cpu" or token_ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"token_ids is {token_ids.dtype} {tuple(token_ids.shape)} on {token_ids.device}; "
            "int64 [T_mb] on the host is wanted"
        )
    for piece in pieces:
        if not 0 <= piece.start < piece.stop <= piece.length:
            raise InputError(f"{piece} must satisfy 0 <= start < stop <= length")
    num_tokens = sum(piece.stop - piece.start for piece in pieces)
    if num_tokens != len(token_ids):
        raise InputError(f"the pieces hold {num_tokens} tokens, token_ids {len(token_ids)}; make them equal")
    if len(token_ids):
        low, high = int(token_ids.min()), int(token_ids.max())
        if low < 0 or high >= vocab_size:
            raise InputError(f"token ids lie in [{low}, {high}]; the vocabulary is [0, {vocab_size})")
