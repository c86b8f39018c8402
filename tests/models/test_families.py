"""The registry, and what a fourth family takes."""

from __future__ import annotations

import pytest
import torch

from pipemoe.errors import CheckpointError
from pipemoe.models.families import MODULES, find_family
from pipemoe.models.families.family import Family
from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import reference_model
from pipemoe.models.routing import RoutingSpec
from tests.models.test_decoder import assert_same_as_reference, packed, sequences_of
from tests.models.tiny import FAMILIES, VOCAB, run_microbatches


class Olmoe(Family):
    """A whole family module: this class and the FAMILY below."""

    model_type = "olmoe"

    def intermediate(self, config):
        return config.intermediate_size

    def routing(self, config):
        return RoutingSpec(
            self.num_experts(config), self.top_k(config), renormalise=config.norm_topk_prob, round_weights=True
        )


FAMILY = Olmoe()


def test_the_three_are_known():
    assert set(MODULES) == set(FAMILIES)
    assert all(find_family(name).model_type == name for name in FAMILIES)
    with pytest.raises(CheckpointError, match="rank 3: model_type is 'olmoe'.*one module.*one line"):
        find_family("olmoe", "rank 3: ")


def test_a_fourth_family_is_one_module_and_one_line(tmp_path, monkeypatch):
    from transformers import OlmoeConfig

    monkeypatch.setitem(MODULES, "olmoe", __name__)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        num_experts=6,
        num_experts_per_tok=3,
        pad_token_id=None,
        eos_token_id=None,
    )
    reference = reference_model(config, "cpu", torch.float32)
    reference.save_pretrained(tmp_path)
    sequences = sequences_of([9, 4])
    microbatches = [packed(sequences, [(0, 0, 5)]), packed(sequences, [(1, 0, 4), (0, 5, 9)])]
    for source in (config, tmp_path):
        parts = [load_decoder(source, rank=r, num_ranks=2, device="cpu", dtype=torch.float32) for r in range(2)]
        logits = run_microbatches(parts[0][0], [weights for _, weights in parts], microbatches)
        assert_same_as_reference(reference, sequences, logits)


def test_checkpoint_names_of_each_family():
    assert find_family("qwen3_moe").expert_names(3, 9) == (
        "model.layers.3.mlp.experts.9.gate_proj.weight",
        "model.layers.3.mlp.experts.9.up_proj.weight",
        "model.layers.3.mlp.experts.9.down_proj.weight",
    )
    assert find_family("mixtral").expert_names(0, 1)[1] == "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert "model.layers.0.block_sparse_moe.gate.weight" in find_family("mixtral").checkpoint_names(
        "model.layers.0.mlp.gate.weight"
    )
