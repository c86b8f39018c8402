"""StepCache: only cut sequences are kept, and their rows come back in order."""

from __future__ import annotations

import pytest
import torch

from pipemoe.errors import InputError
from pipemoe.models.cache import StepCache
from pipemoe.models.packing import Packing, Piece


def microbatch(cache, pieces):
    num_tokens = sum(p.stop - p.start for p in pieces)
    packing = Packing(torch.zeros(num_tokens, dtype=torch.int64), pieces, 1, torch.device("cpu"))
    return cache.of(packing)


def rows(num, heads=2, dim=3):
    return torch.randn(1, heads, num, dim), torch.randn(1, heads, num, dim + 1)


def test_whole_sequences_are_passed_through_and_not_kept():
    cache = StepCache()
    key, value = rows(5)
    got = microbatch(cache, [Piece(0, 0, 2, 2), Piece(1, 0, 3, 3)]).update(key, value, 0)
    assert got[0] is key and got[1] is value
    assert cache.num_bytes == 0


def test_a_cut_sequence_gets_its_earlier_rows_in_front_layer_by_layer():
    cache = StepCache()
    first, second, third = (
        [Piece(9, 0, 2, 8), Piece(1, 0, 3, 3)],
        [Piece(9, 2, 5, 8)],
        [Piece(4, 0, 1, 1), Piece(9, 5, 8, 8)],
    )
    given = {layer: [rows(5), rows(3), rows(4)] for layer in range(2)}
    for layer, (a, b, c) in given.items():
        microbatch(cache, first).update(*a, layer)
        got_b = microbatch(cache, second).update(*b, layer)
        got_c = microbatch(cache, third).update(*c, layer)
        for i in range(2):
            whole = torch.cat([a[i][:, :, :2], b[i]], dim=2)
            assert torch.equal(got_b[i], whole)
            assert torch.equal(got_c[i], torch.cat([c[i][:, :, :1], whole, c[i][:, :, 1:]], dim=2))
    assert cache.num_bytes == 2 * (2 + 3) * 2 * (3 + 4) * 4  # layers, tokens of sequence 9 so far, heads, dims, bytes


def test_kept_rows_do_not_hold_their_neighbours():
    cache = StepCache()
    key, value = rows(1000)
    microbatch(cache, [Piece(0, 0, 999, 999), Piece(1, 0, 1, 2)]).update(key, value, 0)
    ((kept, _),) = cache.earlier(0, 1, 1)
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_a_missing_earlier_piece_is_an_error():
    cache = StepCache()
    microbatch(cache, [Piece(0, 0, 2, 8)]).update(*rows(2), 0)
    with pytest.raises(InputError, match="layer 0: a piece of sequence 0 starts at token 3, but 2 earlier"):
        microbatch(cache, [Piece(0, 3, 8, 8)]).update(*rows(5), 0)
    with pytest.raises(InputError, match="layer 1"):
        microbatch(cache, [Piece(0, 2, 8, 8)]).update(*rows(6), 1)
