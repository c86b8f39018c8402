"""What a checkpoint stores is loaded or refused by name: nothing is dropped in silence, and of two of a kind the right
one is taken.
"""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipemoe.errors import CheckpointError
from pipemoe.models.checkpoint import INDEX, SINGLE
from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import reference_model
from tests.models.test_decoder import assert_same_as_reference, packed, sequences_of
from tests.models.tiny import FAMILIES, VOCAB, run_microbatches, tiny_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of small checkpoints by (family, is tied), one shard each."""
    found = {}
    for family in FAMILIES:
        for tied in (False, True):
            found[family, tied] = tmp_path_factory.mktemp(f"{family}_{tied}")
            config = tiny_config(family, num_layers=2, num_experts=8, tie_word_embeddings=tied)
            reference_model(config, "cpu", torch.float32, seed=3).save_pretrained(
                found[family, tied], save_original_format=True
            )
    return found


@pytest.fixture
def copy_of(saved, tmp_path):
    """Makes a copy of one of them, with tensors changed: copy_of(family, {name: tensor, or None to leave it out},
    config fields).
    """

    def make(family, changes=(), tied=False, **fields):
        folder = shutil.copytree(saved[family, tied], tmp_path / "copy")
        tensors = load_file(folder / SINGLE) | dict(changes)
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        return folder

    return make


def load(folder, rank=0, num_ranks=1, dtype=torch.float32):
    return load_decoder(folder, rank=rank, num_ranks=num_ranks, device="cpu", dtype=dtype)


def logits_of(folder):
    decoder, weights = load(folder)
    sequences = sequences_of([9])
    return sequences, run_microbatches(decoder, [weights], [packed(sequences, [(0, 0, 9)])])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_head_wins_over_tied_embeddings(copy_of, family):
    head = torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(1))
    folder = copy_of(family, {"lm_head.weight": head}, tied=True)
    sequences, logits = logits_of(folder)
    untied = reference_model(
        tiny_config(family, num_layers=2, num_experts=8, tie_word_embeddings=False), "cpu", torch.float32, seed=3
    )
    untied.lm_head.weight = torch.nn.Parameter(head)
    assert_same_as_reference(untied, sequences, logits)
    tied = load(folder)[0]
    assert tied._lm_head.weight.data_ptr() != tied._model.embed_tokens.weight.data_ptr()


def test_a_stored_head_that_is_the_embedding_again_takes_no_memory(saved, copy_of):
    embedding = load_file(saved["qwen3_moe", True] / SINGLE)["model.embed_tokens.weight"]
    decoder, _ = load(copy_of("qwen3_moe", {"lm_head.weight": embedding.clone()}, tied=True))
    assert decoder._lm_head.weight.data_ptr() == decoder._model.embed_tokens.weight.data_ptr()
    assert decoder.num_bytes == load(saved["qwen3_moe", True])[0].num_bytes


def test_untied_embeddings_need_a_stored_head(copy_of):
    folder = copy_of("mixtral", {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"^rank 0: .*tensor lm_head.weight is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("qwen3_moe", "model.layers.1.self_attn.q_proj.bias", (64,)),
        ("mixtral", "model.layers.0.self_attn.k_proj.bias", (32,)),
        ("qwen3_moe", "model.layers.0.mlp.experts.3.down_proj.bias", (64,)),
        ("qwen3_moe", "model.layers.0.mlp.experts.8.down_proj.weight", (64, 48)),
        ("qwen3_moe", "model.layers.0.mlp.gate.e_score_correction_bias", (8,)),
        ("mixtral", "model.layers.0.self_attn.q_norm.weight", (16,)),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w1.qweight", (4,)),
        ("qwen3_moe", "model.layers.0.mlp.shared_expert.up_proj.weight", (4, 64)),
        ("deepseek_v3", "model.layers.1.mlp.shared_experts.gate_proj.bias", (64,)),
        ("deepseek_v3", "model.layers.0.mlp.down_proj.weight_scale_inv", (1, 1)),
        ("deepseek_v3", "model.layers.1.mlp.experts.0.up_proj.input_scale", (1,)),
        ("deepseek_v3", "score.weight", (2, 64)),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(copy_of, family, name, shape):
    folder = copy_of(family, {name: torch.zeros(shape)})
    with pytest.raises(
        CheckpointError, match=f"^rank 1: .*no place for the stored tensor {name} .in {SINGLE}.*config.json"
    ):
        load(folder, 1, 2)


def test_biases_that_the_config_asks_for_are_loaded(copy_of):
    names = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": torch.ones(size)
        for layer in range(2)
        for part, size in zip("qkvo", (64, 32, 32, 64))
    }
    folder = copy_of("qwen3_moe", names, attention_bias=True)
    sequences, logits = logits_of(folder)
    assert_same_as_reference(reference_model(folder, "cpu", torch.float32), sequences, logits)


def test_a_missing_router_bias_is_named(copy_of):
    folder = copy_of("deepseek_v3", {"model.layers.1.mlp.gate.e_score_correction_bias": None})
    with pytest.raises(CheckpointError, match="tensor model.layers.1.mlp.gate.e_score_correction_bias is missing"):
        load(folder)


def test_nan_in_a_router_bias_is_refused(copy_of):
    """It is a buffer of transformers' modules, not one of their parameters."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    folder = copy_of("deepseek_v3", {name: torch.full((tiny_config("deepseek_v3").n_routed_experts,), torch.nan)})
    with pytest.raises(CheckpointError, match="e_score_correction_bias holds NaN"):
        load(folder)


def test_what_is_left_out_by_rule_is_said(copy_of, caplog):
    extra = {
        "model.layers.2.eh_proj.weight": torch.zeros(64, 128),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    folder = copy_of("deepseek_v3", extra, num_nextn_predict_layers=1)
    with caplog.at_level(logging.INFO, "pipemoe"):
        load(folder)
    assert [r.levelname for r in caplog.records if "the stored layers 2 are not read" in r.getMessage()] == ["INFO"]


def test_a_config_cut_to_its_first_layers_warns(copy_of, caplog):
    load(copy_of("mixtral", num_hidden_layers=1))
    assert [
        r.levelname
        for r in caplog.records
        if "num_hidden_layers is 1; the stored layers 1 are not read" in r.getMessage()
    ] == ["WARNING"]


def test_weights_under_two_names_are_refused(saved, copy_of):
    gate = load_file(saved["mixtral", False] / SINGLE)["model.layers.0.block_sparse_moe.gate.weight"]
    folder = copy_of("mixtral", {"model.layers.0.mlp.gate.weight": gate + 1})
    with pytest.raises(
        CheckpointError, match="block_sparse_moe.gate.weight and model.layers.0.mlp.gate.weight are both stored"
    ):
        load(folder)
    shutil.rmtree(folder)
    fused = {
        "model.layers.1.mlp.experts.gate_up_proj": torch.zeros(8, 96, 64),
        "model.layers.1.mlp.experts.down_proj": torch.zeros(8, 64, 48),
    }
    with pytest.raises(CheckpointError, match="gate_up_proj and .*w1.weight are both stored"):
        load(copy_of("mixtral", fused))


@pytest.fixture
def in_two_shards(saved, tmp_path):
    """Writes a qwen3_moe checkpoint as shards a and b, with `twice` in both (other values in b); returns its directory
    and the index.
    """

    def make(twice):
        folder = shutil.copytree(saved["qwen3_moe", False], tmp_path / "shards")
        tensors = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        half = sorted(tensors)[::2]
        a = {name: tensors[name] for name in half} | {twice: tensors[twice]}
        b = {name: tensors[name] for name in tensors if name not in half} | {twice: tensors[twice] + 1}
        save_file(a, folder / "a.safetensors"), save_file(b, folder / "b.safetensors")
        return folder, {name: "a.safetensors" if name in a else "b.safetensors" for name in tensors}

    return make


@pytest.mark.parametrize("shard", ["a", "b"])
def test_of_a_tensor_in_two_shards_the_index_says_which_one_holds(in_two_shards, saved, shard):
    norm = "model.norm.weight"
    folder, index = in_two_shards(norm)
    (folder / INDEX).write_text(json.dumps({"weight_map": index | {norm: f"{shard}.safetensors"}}))
    wanted = load(saved["qwen3_moe", False])[0]._model.norm.weight + (shard == "b")
    assert torch.equal(load(folder)[0]._model.norm.weight, wanted)


def test_a_tensor_in_two_shards_that_no_index_places(in_two_shards):
    norm = "model.norm.weight"
    folder, index = in_two_shards(norm)
    del index[norm]
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match=f"b.safetensors: tensor {norm} is in a.safetensors as well"):
        load(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e5m2, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_odd_dtypes(copy_of, dtype):
    folder = copy_of(
        "mixtral", {"model.layers.0.block_sparse_moe.experts.1.w2.weight": torch.zeros(64, 48, dtype=dtype)}
    )
    with pytest.raises(CheckpointError, match="experts.1.w2.weight is stored as .*Convert it to bfloat16 first"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "/etc/x.safetensors",
        "a/../../x.safetensors",
        "..",
        "",
        "x.bin",
        "a\\..\\x.safetensors",
        7,
        None,
    ],
)
def test_a_shard_outside_of_the_directory(saved, tmp_path, name):
    folder = shutil.copytree(saved["mixtral", False], tmp_path / "folder")
    shutil.copy(folder / SINGLE, tmp_path / "outside.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(
        CheckpointError, match=r"^rank 0: .*index.json.*(lists the shard .*inside of|is not a shard index)"
    ):
        load(folder)


def test_shards_may_be_links_and_lie_in_folders(saved, tmp_path):
    """As in a cache of downloads, whose snapshots are links to blobs elsewhere."""
    source = saved["mixtral", False]
    folder, store = tmp_path / "snapshot", tmp_path / "blobs"
    (folder / "part").mkdir(parents=True), store.mkdir()
    shutil.copy(source / "config.json", folder)
    shutil.copy(source / SINGLE, store / "0a1b")
    (folder / "part" / "x.safetensors").symlink_to(store / "0a1b")
    names = load_file(source / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "part/x.safetensors")}))
    assert torch.equal(load(folder)[0]._model.norm.weight, load(source)[0]._model.norm.weight)
