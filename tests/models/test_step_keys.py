"""StepKeys: every microbatch writes its rows, and sees all that were written in the step."""

from __future__ import annotations

import torch

from pipemoe.models.loading import load_decoder
from pipemoe.models.packing import Packing, Piece
from pipemoe.models.step_keys import StepKeys
from tests.models.tiny import tiny_config


def test_rows_have_places_of_their_own():
    decoder, _ = load_decoder(tiny_config("mixtral"), rank=0, num_ranks=1, device="cpu", dtype=torch.float32)
    keys = StepKeys(decoder, max_tokens=9)
    assert len(keys) == 10 and keys.padding_row == 9
    step = keys.step([0, 5, 9])
    (heads, size), _ = decoder.key_sizes()
    given = {}
    for pieces in ([Piece(0, 0, 2, 5)], [Piece(1, 0, 4, 4)], [Piece(0, 2, 5, 5)]):
        num_tokens = sum(p.stop - p.start for p in pieces)
        packing = Packing(torch.zeros(num_tokens, dtype=torch.long), pieces, 1, torch.device("cpu"), step.begins)
        for layer in range(decoder.config.num_hidden_layers):
            new = given[pieces[0], layer] = (
                torch.randn(1, heads, num_tokens, size),
                torch.randn(1, heads, num_tokens, size),
            )
            seen = step.of(packing).update(*new, layer)
            assert [t.shape for t in seen] == [(1, heads, 10, size)] * 2
    for layer in range(decoder.config.num_hidden_layers):
        for which in range(2):
            whole = torch.cat(
                [given[piece, layer][which] for piece in (Piece(0, 0, 2, 5), Piece(0, 2, 5, 5), Piece(1, 0, 4, 4))],
                dim=2,
            )
            found = keys.write(layer, torch.tensor([9]), *(torch.zeros(1, heads, 1, size),) * 2)[which]
            assert torch.equal(found[:, :, :9], whole)


def test_latents_are_no_keys():
    for family, caches_keys in (("deepseek_v3", False), ("qwen3_moe", True)):
        decoder, _ = load_decoder(tiny_config(family), rank=0, num_ranks=1, device="cpu", dtype=torch.float32)
        assert decoder.caches_keys is caches_keys
