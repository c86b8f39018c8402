"""Checkpoints on disk: parity after save_pretrained, only local experts are read, and every way to be broken."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipemoe.errors import CheckpointError
from pipemoe.experts.weights import local_range
from pipemoe.models import checkpoint as checkpoint_module
from pipemoe.models.loading import load_decoder
from pipemoe.models.random_weights import reference_model
from tests.models.test_decoder import assert_same_as_reference, packed, sequences_of
from tests.models.tiny import FAMILIES, run_microbatches, tiny_config


def save(directory, family, *, fused=False, shard="10GB", dtype=torch.float32, **changes):
    """A checkpoint of random weights; returns its directory."""
    model = reference_model(tiny_config(family, **changes), "cpu", dtype, seed=3)
    model.save_pretrained(directory, max_shard_size=shard, save_original_format=not fused)
    return directory


def load(directory, rank=0, num_ranks=1, dtype=torch.float32):
    return load_decoder(directory, rank=rank, num_ranks=num_ranks, device="cpu", dtype=dtype)


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("shard", ["10GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_after_save_pretrained(tmp_path, family, shard, fused):
    directory = save(tmp_path, family, fused=fused, shard=shard, num_experts=7 if family == "mixtral" else 8)
    assert (directory / "model.safetensors.index.json").exists() == (shard != "10GB")
    parts = [load(directory, rank, 3) for rank in range(3)]
    sequences = sequences_of([14, 3])
    microbatches = [packed(sequences, [(0, 0, 6), (1, 0, 3)]), packed(sequences, [(0, 6, 14)])]
    logits = run_microbatches(parts[0][0], [weights for _, weights in parts], microbatches)
    assert_same_as_reference(reference_model(directory, "cpu", torch.float32), sequences, logits)
    for decoder, weights in parts:
        assert decoder.fingerprint == parts[0][0].fingerprint
        for layer, layer_weights in enumerate(weights):
            layer_weights.validate(layer)


def test_checkpoint_and_random_weights_of_one_seed_are_the_same_numbers(tmp_path):
    directory = save(tmp_path, "deepseek_v3")
    decoder, weights = load(directory, 1, 2)
    _, made = load_decoder(tiny_config("deepseek_v3"), rank=1, num_ranks=2, device="cpu", dtype=torch.float32, seed=3)
    for a, b in zip(weights, made):
        assert torch.equal(a.gate_up, b.gate_up) and torch.equal(a.down, b.down)
        assert a.first_expert == b.first_expert == 4


def test_dtype_is_converted_while_loading_and_router_bias_stays_float32(tmp_path):
    directory = save(tmp_path, "deepseek_v3", dtype=torch.float32)
    decoder, weights = load(directory, dtype=torch.bfloat16)
    assert weights[0].dtype == torch.bfloat16
    assert {p.dtype for p in decoder._model.parameters()} == {torch.bfloat16}
    assert decoder._gate_biases[0].dtype == torch.float32


def test_tied_embeddings(tmp_path):
    directory = save(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()
    decoder, weights = load(directory)
    sequences = sequences_of([8])
    logits = run_microbatches(decoder, [weights], [packed(sequences, [(0, 0, 8)])])
    assert_same_as_reference(reference_model(directory, "cpu", torch.float32), sequences, logits)


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_other_ranks_experts_are_never_read_and_never_allocated(tmp_path, monkeypatch, fused):
    num_experts, num_ranks, rank = 8, 3, 1
    directory = save(tmp_path, "mixtral", fused=fused, shard="60KB", num_experts=num_experts)
    config = tiny_config("mixtral", num_experts=num_experts)
    reads = []  # (tensor name, bytes) of everything that leaves safetensors

    class Watched:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *args):
            self.file.__exit__(*args)

        def get_slice(self, name):
            view = self.file.get_slice(name)

            class WatchedSlice:
                def __getitem__(self, item):
                    tensor = view[item]
                    reads.append((name, tensor.nbytes))
                    return tensor

            return WatchedSlice()

    monkeypatch.setattr("safetensors.safe_open", Watched)
    decoder, weights = load(directory, rank, num_ranks)

    local = local_range(num_experts, num_ranks, rank)
    expert_reads = [(name, size) for name, size in reads if ".experts." in name]
    expert_bytes = 3 * config.hidden_size * config.intermediate_size * 4
    assert sum(size for _, size in expert_reads) == config.num_hidden_layers * len(local) * expert_bytes
    if not fused:
        assert {int(name.split(".experts.")[1].split(".")[0]) for name, _ in expert_reads} == set(local)
    assert sum(w.num_bytes for w in weights) == config.num_hidden_layers * len(local) * expert_bytes
    assert not any(".experts" in name for name, _ in decoder._model.named_parameters())
    assert not any(p.is_meta for p in decoder._model.parameters())
    assert sum(size for _, size in reads) - sum(size for _, size in expert_reads) == decoder.num_bytes


def test_a_rank_without_experts_reads_none(tmp_path):
    directory = save(tmp_path, "mixtral", num_experts=2)
    decoder, weights = load(directory, 0, 3)
    assert [w.num_local_experts for w in weights] == [0] * decoder.shape.num_layers


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save(tmp_path_factory.mktemp("sharded"), "qwen3_moe", shard="60KB")


@pytest.fixture
def broken(sharded, tmp_path):
    """A copy of a sharded checkpoint to damage."""
    return shutil.copytree(sharded, tmp_path / "copy")


def shard_with(directory, part):
    weight_map = json.loads((directory / checkpoint_module.INDEX).read_text())["weight_map"]
    name = next(name for name in weight_map if part in name)
    return directory / weight_map[name], name


def test_missing_shard(broken):
    shard, _ = shard_with(broken, "experts.5")
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"^rank 2: .*{shard.name}: shard is missing.*fetch it again"):
        load(broken, 2, 4)


@pytest.mark.parametrize("left", ["nothing", "half_a_header", "header", "all_but_one_byte"])
def test_truncated_shard(broken, left):
    shard, _ = shard_with(broken, "experts.5")
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    keep = {"nothing": 0, "half_a_header": header // 2, "header": header, "all_but_one_byte": len(data) - 1}[left]
    shard.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=rf"^rank 1: .*{shard.name}: shard is truncated: {keep} bytes"):
        load(broken, 1, 2)


def test_damaged_header(broken):
    shard, _ = shard_with(broken, "q_proj")
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    shard.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=f"{shard.name}: shard has a damaged header"):
        load(broken)


def change_tensor(directory, part, change):
    shard, name = shard_with(directory, part)
    tensors = load_file(shard)
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name]
    save_file(tensors, shard)
    return shard, name


@pytest.mark.parametrize("part", ["layers.1.self_attn.k_proj", "layers.2.mlp.experts.1.up_proj"])
def test_missing_tensor(broken, part):
    _, name = change_tensor(broken, part, lambda tensor: None)
    with pytest.raises(CheckpointError, match=rf"^rank 0: .*tensor {name} is missing from all"):
        load(broken, 0, 2)


def test_another_ranks_missing_expert_is_not_ours(broken):
    change_tensor(broken, "layers.2.mlp.experts.7.up_proj", lambda tensor: None)
    load(broken, 0, 2)


@pytest.mark.parametrize("part", ["layers.0.input_layernorm", "layers.2.mlp.experts.1.down_proj", "embed_tokens"])
def test_wrong_shape(broken, part):
    shard, name = change_tensor(broken, part, lambda tensor: tensor[:-1].clone())
    with pytest.raises(CheckpointError, match=rf"^rank 0: .*{shard.name}: tensor {name} has shape .* config wants"):
        load(broken, 0, 2)


def test_stored_in_fp8(broken):
    _, name = change_tensor(broken, "layers.0.self_attn.q_proj", lambda tensor: tensor.to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=f"{name} is stored as F8_E4M3.*quantised in another way"):
        load(broken)


def test_damaged_index(broken):
    (broken / checkpoint_module.INDEX).write_text('{"weights": 3}')
    with pytest.raises(CheckpointError, match="is not a shard index"):
        load(broken)


def test_pickle_is_refused_without_being_opened(tmp_path):
    tiny_config("mixtral").save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never looked at")
    with pytest.raises(CheckpointError, match=r"^rank 0: .*only pytorch_model.bin, which is pickle"):
        load(tmp_path)


def test_no_weights_at_all(tmp_path):
    tiny_config("mixtral").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        load(tmp_path)


def test_digest_sees_headers_and_data(sharded, broken):
    same = load(broken)[0].fingerprint
    assert same == load(sharded)[0].fingerprint
    change_tensor(broken, "layers.1.self_attn.q_proj", lambda tensor: tensor * 1.01)
    assert same != load(broken)[0].fingerprint
