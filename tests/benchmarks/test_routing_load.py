"""Tokens per expert, counted from a step's rows, against what every rank's router said."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.routing_load import ExpertLoads, counted, expected_active
from pipemoe import Config, load_model
from tests.models.tiny import VOCAB, tiny_config

CPU = torch.device("cpu")


@pytest.mark.mpi
@pytest.mark.parametrize("mode", ["broadcast", "padded", "chunked", "per_rank"])
def test_counts_are_those_of_all_ranks_routers(world, mode, monkeypatch):
    config = Config(mode=mode, moe_max_num_tokens=8, max_tokens_per_rank=32, graph_tokens=0)
    model = load_model(tiny_config("qwen3_moe", num_layers=2), world, seed=1, config=config)
    routed: list[tuple[int, torch.Tensor]] = []
    attend = model.decoder.attend

    def watched(state, layer, *sums_and_rows):
        found = attend(state, layer, *sums_and_rows)
        routed.append((layer, found[1].clone()))  # read after the step: a copy to the host would wait inside it
        return found

    monkeypatch.setattr(model.decoder, "attend", watched)
    tokens = torch.arange(11 * (world.rank != 1)) * (world.rank + 3) % VOCAB  # nothing on rank 1
    before = model.runtime.experts_with_free_sms
    with counted(model) as loads:
        model.prefill([tokens] if len(tokens) else [])
        mine = json.dumps([(layer, ids.flatten().tolist()) for layer, ids in routed])
        everywhere = [json.loads(payload) for payload in world.all_gather(mine.encode())]
    assert model.runtime.experts_with_free_sms is before
    wanted = torch.zeros(2, 8, dtype=torch.long)
    for layer, ids in (pair for of_rank in everywhere for pair in of_rank):
        wanted[layer] += torch.bincount(torch.tensor(ids), minlength=8)
    assert torch.equal(loads.counts(), wanted)
    assert wanted.sum() == 2 * 3 * 11 * (world.size - (world.size > 1))


def test_figures_are_means_over_layers():
    loads = ExpertLoads(2, 4, CPU)
    assert loads.figures() == {"active_experts": None, "expert_load_max_over_mean": None}
    loads.add(0, torch.tensor([[0, 1], [0, 2], [-1, 0]], dtype=torch.int32))
    loads.add(1, torch.tensor([[3, 3]], dtype=torch.int32))
    assert loads.counts().tolist() == [[3, 1, 1, 0], [0, 0, 0, 2]]
    assert loads.active_experts == 2.0
    assert loads.max_over_mean == pytest.approx((3 / (5 / 4) + 4) / 2)


def test_expected_active_experts():
    assert expected_active(8, 2, 1) == pytest.approx(2)
    assert expected_active(128, 8, 16) == pytest.approx(82.4, abs=0.05)
    assert expected_active(4, 4, 3) == 4
