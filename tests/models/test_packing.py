"""Packing: where the pieces lie."""

from __future__ import annotations

import torch

from pipemoe.models.packing import Packing, Piece, Span

PIECES = [Piece(0, 0, 4, 4), Piece(7, 3, 5, 6), Piece(2, 1, 2, 2)]


def make(pieces=PIECES):
    num_tokens = sum(p.stop - p.start for p in pieces)
    return Packing(torch.arange(num_tokens), pieces, 100, torch.device("cpu"))


def test_index_tensors():
    packing = make()
    assert packing.token_ids.tolist() == list(range(7))
    assert packing.positions.tolist() == [0, 1, 2, 3, 3, 4, 1]
    assert packing.end_rows.tolist() == [3, 6]  # the piece of sequence 7 does not end it
    assert packing.query_offsets.tolist() == [0, 4, 6, 7]
    assert packing.key_offsets.tolist() == [0, 4, 9, 11]
    assert all(
        t.dtype == torch.int32
        for t in (packing.token_ids, packing.positions, packing.end_rows, packing.query_offsets, packing.key_offsets)
    )


def test_keys_in_places_of_their_own():
    packing = Packing(torch.arange(7), PIECES, 100, torch.device("cpu"), begins={0: 10, 7: 20, 2: 30})
    assert packing.key_rows.tolist() == [10, 11, 12, 13, 23, 24, 31]
    assert packing.key_offsets.tolist() == [10, 20, 30, 32]
    assert packing.key_lengths.tolist() == [4, 5, 2]
    assert make().key_rows is None and make().key_lengths is None


def test_spans_and_maxima():
    packing = make()
    assert packing.spans == [Span(0, 4, 0, 4), Span(4, 6, 4, 9), Span(6, 7, 9, 11)]
    assert (packing.num_tokens, packing.num_keys, packing.max_query, packing.max_key) == (7, 11, 4, 5)
    assert not packing.starts_fresh and make(PIECES[:1]).starts_fresh


def test_masks_look_back_only_and_are_kept():
    packing = make()
    assert packing.mask(1, None).tolist() == [[True] * 4 + [False], [True] * 5]
    assert packing.mask(1, 2).tolist() == [[False, False, True, True, False], [False, False, False, True, True]]
    assert packing.mask(1, None) is packing.mask(1, None)


def test_empty():
    packing = make([])
    assert packing.num_keys == packing.num_tokens == packing.max_query == 0
    assert packing.query_offsets.tolist() == [0]
    assert Packing(torch.arange(0), [], 100, torch.device("cpu"), begins=[0]).key_rows.tolist() == []
