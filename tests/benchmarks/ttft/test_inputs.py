"""Workloads: what every rank gets, and that it is the same whoever asks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.ttft.inputs import (
    drawn_workloads,
    rank_tokens_workload,
    shortened,
    trace_workload,
    without_last_rank,
)
from benchmarks.ttft.models import BenchModel
from pipemoe.errors import CheckpointError, ConfigError, InputError
from pipemoe.model_facts.known_models import MODEL_CONFIGS

SHAPE = {"first": 0, "num_requests": 7, "scale": 0.5, "prompts_per_step": 1}


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "seven.csv"
    rows = [f"{1000 + 10 * i},{2 * (i + 1)},1" for i in range(7)]
    path.write_text("\n".join(["timestamp_ms,input_tokens,output_tokens", *rows]) + "\n")
    return str(path)


def test_requests_are_dealt_in_turn_and_cut_into_steps(trace):
    workload = trace_workload(trace, 3, **SHAPE)
    assert workload.name == workload.rank_tokens == "seven"
    assert [[[p.num_tokens for p in of_rank] for of_rank in step] for step in workload.steps] == [
        [[1], [2], [3]],
        [[4], [5], [6]],
        [[7], [], []],
    ]
    assert [p.arrival_s for p in workload.prompts[1]] == pytest.approx([0.01, 0.04])
    assert workload.max_tokens_per_rank == workload.longest == 7
    assert {p.rank for p in workload.prompts[2]} == {2}


def test_requests_longer_than_the_model_takes(trace):
    def tokens(**more):
        workload = trace_workload(trace, 3, **SHAPE, **more)
        return [p.num_tokens for step in workload.steps for of_rank in step for p in of_rank], workload

    assert tokens(most=7)[0] == tokens()[0] == [1, 2, 3, 4, 5, 6, 7]
    lengths, workload = tokens(most=5, too_long="clip")
    assert lengths == [1, 2, 3, 4, 5, 5, 5] and (workload.clipped, workload.dropped) == (2, 0)
    lengths, workload = tokens(most=5, too_long="drop")
    assert lengths == [1, 2, 3, 4, 5] and (workload.clipped, workload.dropped) == (0, 2)
    with pytest.raises(InputError, match="seven.csv: 2 of 7 requests have more than 5 input tokens, up to 7; --too"):
        tokens(most=5)
    with pytest.raises(InputError, match="all 7 requests have more than 0 input tokens"):
        tokens(most=0, too_long="drop")


def test_parity_looks_at_the_beginning_of_long_prompts(trace):
    step = trace_workload(trace, 3, **SHAPE).steps[1]
    assert [[p.num_tokens for p in of_rank] for of_rank in shortened(step, 5)] == [[4], [5], [5]]
    assert shortened(step, 6) == step


def test_a_step_may_give_each_rank_several(trace):
    workload = trace_workload(trace, 2, **{**SHAPE, "prompts_per_step": 3})
    assert [[[p.num_tokens for p in of_rank] for of_rank in step] for step in workload.steps] == [
        [[1, 3, 5], [2, 4, 6]],
        [[7], []],
    ]
    assert workload.max_tokens_per_rank == 12


def test_token_ids_depend_on_seed_and_prompt_alone(trace):
    first, second = (p for p in trace_workload(trace, 3, **SHAPE).prompts[0][1:])
    assert torch.equal(first.token_ids(100, 1), first.token_ids(100, 1))
    assert not torch.equal(second.token_ids(100, 1)[:4], first.token_ids(100, 1))
    assert not torch.equal(first.token_ids(100, 1), first.token_ids(100, 2))
    assert int(second.token_ids(5, 0).max()) < 5


def test_rank_tokens_are_one_step():
    workload = rank_tokens_workload("40,0,7", 3)
    assert workload.rank_tokens == [40, 0, 7] and workload.name == "40_0_7"
    assert [[p.num_tokens for p in of_rank] for of_rank in workload.steps[0]] == [[40], [], [7]]
    assert without_last_rank(workload.steps[0])[2] == ()
    with pytest.raises(InputError, match="no rank has any"):
        rank_tokens_workload("0,0", 2)


def test_draws_are_the_same_everywhere_and_within_bounds(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "timestamp_ms,input_tokens,output_tokens\n" + "".join(f"{i},{n},1\n" for i, n in enumerate((5, 10, 20, 4000)))
    )
    drawn = drawn_workloads(str(path), 3, 4, scale=1.0, most=20)
    assert [w.rank_tokens for w in drawn] == [
        w.rank_tokens for w in drawn_workloads(str(path), 3, 4, scale=1.0, most=20)
    ]
    assert len({str(w.rank_tokens) for w in drawn}) > 1 and {n for w in drawn for n in w.rank_tokens} <= {5, 10, 20}
    assert all(w.trace == "mine" and len(w.steps) == 1 and w.max_tokens_per_rank == max(w.rank_tokens) for w in drawn)
    with pytest.raises(InputError, match="more than 4 tokens"):
        drawn_workloads(str(path), 3, 1, scale=1.0, most=4)
    assert drawn_workloads(str(path), 3, 0, scale=1.0, most=4) == []


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_presets_are_configs_that_can_be_cut(name):
    from pipemoe.models.config import read_config
    from pipemoe.models.families import check_config

    model = BenchModel(name)
    layers = model.first_moe_layer + 1
    with model.source(layers) as source:
        config, directory = read_config(source, random_weights=model.random_weights)
        assert directory is None and config.num_hidden_layers == layers
        assert len(check_config(config).moe_layers(config)) == 1
    assert MODEL_CONFIGS[name]["num_hidden_layers"] == model.num_layers  # cutting left the preset as it was


@pytest.mark.parametrize("name, layers, first", [("gpt-oss-20b", 24, 0), ("glm-4.5-air", 46, 1)])
def test_configs_of_families_that_no_file_states(name, layers, first):
    from pipemoe.models.config import read_config

    model = BenchModel(f"benchmarks/models/{name}.json", first + 2)
    assert (model.name, model.first_moe_layer, model.num_layers) == (name, first, first + 2)
    assert model.positions == 131072
    with model.source(first + 2) as source:
        assert read_config(source, random_weights=True)[0].num_hidden_layers == first + 2
    with pytest.raises(ConfigError, match=f"has {layers}"):
        BenchModel(f"benchmarks/models/{name}.json", layers + 1)


def test_a_checkpoint_is_cut_by_links(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**MODEL_CONFIGS["small"], "layer_types": ["full_attention"] * 8}))
    save_file({"weights": torch.ones(3)}, tmp_path / "model.safetensors")
    model = BenchModel(str(tmp_path), layers=6)
    assert model.num_layers == 6 and model.name == tmp_path.name
    with model.source(2) as source:
        config = json.loads((source / "config.json").read_text())
        assert config["num_hidden_layers"] == 2 and len(config["layer_types"]) == 2
        assert (source / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert not source.exists()
    with model.source(8) as source:
        assert source == tmp_path


def test_wrong_models_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a model is one of small, "):
        BenchModel("no-such-model")
    with pytest.raises(ConfigError, match="--layers is 9; small has 8"):
        BenchModel("small", 9)
    (tmp_path / "config.json").write_text(json.dumps(MODEL_CONFIGS["small"]))
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor"):
        BenchModel(str(tmp_path))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list"):
        BenchModel(str(tmp_path / "list.json"))
