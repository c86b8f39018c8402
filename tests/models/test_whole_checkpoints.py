"""Checkpoints of families that no file here states, as they are found: names, formats, what is left out and refused."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipemoe.e4m3 import num_blocks
from pipemoe.errors import CheckpointError
from pipemoe.models.checkpoint import Checkpoint
from pipemoe.models.config import read_config
from pipemoe.models.decoder import Piece
from pipemoe.models.loading import load_decoder, prepare_decoder
from pipemoe.models.random_weights import reference_model
from tests.experts.oracle import expected, make_rows
from tests.models.tiny_families import VOCAB, make_model, tiny_family_config

IDS = torch.arange(4, 15)


def save(folder, model):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def write(folder, tensors, config):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def load(source, rank=0, num_ranks=1, **more):
    place = {"rank": rank, "num_ranks": num_ranks, "device": "cpu", "dtype": torch.float32}
    return load_decoder(source, **place | more)


def logits(source, num_ranks=1, **more):
    """Of one sequence, the experts of all ranks summed."""
    ranks = [load(source, rank, num_ranks, **more) for rank in range(num_ranks)]
    decoder = ranks[0][0]
    state = decoder.start(decoder.new_step(), IDS, [Piece(0, 0, len(IDS), len(IDS))])
    y = None
    for layer in range(decoder.shape.num_layers):
        x, ids, weights = decoder.attend(state, layer, y)
        y = sum(expected(make_rows(x, ids, weights), own[layer]) for _, own in ranks).float()
    return decoder.finish(state, y)[0]


def wanted(model):
    with torch.no_grad():
        return model(IDS[None]).logits[0, -1]


def close(found, model, tolerance=1e-4):
    return torch.allclose(found, wanted(model), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "dbrx", "granitemoe", "longcat_flash"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_read_their_own_experts_alone(family, num_ranks, tmp_path):
    model = make_model(family)
    tensors, _ = save(tmp_path, model)
    assert close(logits(tmp_path, num_ranks), model)
    read = []
    for rank in range(num_ranks):
        place = {"rank": rank, "num_ranks": num_ranks, "device": "cpu", "dtype": torch.float32}
        prepared = prepare_decoder(tmp_path, **place)
        prepared.load()
        read.append(prepared._checkpoint.bytes_read)
    of_experts = sum(t.nbytes for name, t in tensors.items() if "experts" in name and "shared" not in name)
    assert sum(read) < num_ranks * (sum(t.nbytes for t in tensors.values()) - of_experts) + 1.5 * of_experts


def test_more_ranks_than_experts(tmp_path):
    model = make_model("gpt_oss")
    save(tmp_path, model)
    assert close(logits(tmp_path, 11), model)


@pytest.mark.parametrize("family", ["olmoe", "minimax", "phimoe", "jamba"])
def test_stacked_experts_under_the_names_of_today(family, tmp_path):
    """What transformers holds in memory, written as it is; it writes older names itself."""
    model = make_model(family)
    _, config = save(tmp_path, model)
    tied = model.all_tied_weights_keys
    write(tmp_path, {name: t for name, t in model.state_dict().items() if name not in tied}, config)
    assert close(logits(tmp_path, 2), model)


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("is_stacked", [False, True])
def test_fp8_with_scales_of_any_kind(scales, is_stacked, tmp_path):
    model = make_model("olmoe")
    tensors, config = save(tmp_path, model)
    if is_stacked:
        tensors = dict(model.state_dict())
    quantised = {}
    own = model.state_dict()
    for name, tensor in list(tensors.items()):
        if not (name.endswith("_proj.weight") or name.endswith("_proj")):
            continue
        shape = (*tensor.shape[:-2], num_blocks(tensor.shape[-2]), num_blocks(tensor.shape[-1]))
        scale = torch.full(shape, 2.0**-7).to(scales)
        values = (tensor * 2.0**7).to(torch.float8_e4m3fn)
        quantised |= {name: values, f"{name}_scale_inv": scale}
        tensors[name] = values.float() * 2.0**-7
        if name in own:
            own[name].copy_(tensors[name])
    if not is_stacked:
        for layer, decoder_layer in enumerate(model.model.layers):
            experts, base = decoder_layer.mlp.experts, f"model.layers.{layer}.mlp.experts"
            for e in range(8):
                parts = [tensors[f"{base}.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")]
                experts.gate_up_proj.data[e], experts.down_proj.data[e] = torch.cat(parts[:2]), parts[2]
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write(tmp_path, tensors | quantised, config)
    assert close(logits(tmp_path, 2), model)


def test_mxfp4_of_gpt_oss(tmp_path):
    """Matrices lie [out, in] in it, whatever the model's do."""
    model = make_model("gpt_oss", hidden_size=64, intermediate_size=64)
    tensors, config = save(tmp_path, model)
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    generator = torch.Generator().manual_seed(1)
    for name, tensor in list(tensors.items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, columns, rows = tensor.shape
        codes = torch.randint(0, 16, (experts, rows, columns // 32, 32), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        values = torch.where(codes >= 8, -1.0, 1.0) * table[(codes & 7).long()]
        values = (values * 2.0 ** (scales.float() - 127)[..., None]).flatten(2)
        del tensors[name]
        tensors[f"{name}_blocks"] = codes[..., ::2] | (codes[..., 1::2] << 4)
        tensors[f"{name}_scales"] = scales
        model.get_parameter(name).data.copy_(values.transpose(1, 2))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    write(tmp_path, tensors, config)
    assert close(logits(tmp_path, 3), model)


@pytest.mark.parametrize("stored, is_tied", [("none", True), ("same", True), ("other", False)])
def test_a_stored_head_that_differs_wins(stored, is_tied, tmp_path):
    model = make_model("olmoe", tie_word_embeddings=True)
    tensors, config = save(tmp_path, model)
    tensors.pop("lm_head.weight", None)
    if stored != "none":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "other":
        tensors["lm_head.weight"] *= 2
    write(tmp_path, tensors, config)
    found = logits(tmp_path)
    assert torch.allclose(found, wanted(model) * (1 if is_tied else 2), atol=1e-4)


def test_layers_for_multi_token_prediction_are_left_out(tmp_path):
    model = make_model("glm4_moe")
    tensors, config = save(tmp_path, model)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    tensors["model.layers.3.mlp.gate.weight"] = torch.zeros(8, 64)
    write(tmp_path, tensors, config)
    assert close(logits(tmp_path), model)


@pytest.mark.parametrize("dtype_name", ["dtype", "torch_dtype"])
def test_older_names_of_the_config(dtype_name, tmp_path):
    """rope_theta and rope_scaling by themselves, and torch_dtype."""
    model = make_model("olmoe")
    tensors, config = save(tmp_path, model)
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, dtype_name: "bfloat16"}
    write(tmp_path, tensors, config)
    assert close(logits(tmp_path), model)


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path):
    model = make_model("deepseek_v3")
    tensors, config = save(tmp_path, model)
    write(tmp_path, tensors, config | {"model_type": "kimi_k2", "scoring_func": "sigmoid"})
    assert close(logits(tmp_path, 2), model)


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "qwen3_next", "granitemoe"])
def test_random_weights_are_those_of_the_reference(family):
    config = tiny_family_config(family)
    assert close(logits(config, 2, seed=3), reference_model(config, "cpu", torch.float32, 3))


def test_bfloat16_is_as_near_as_transformers(tmp_path):
    model = make_model("qwen3_next")
    save(tmp_path, model)
    found, narrow = (
        logits(tmp_path, dtype=torch.bfloat16),
        wanted(make_model("qwen3_next", dtype=torch.bfloat16)).float(),
    )
    assert (found - narrow).norm() < 0.03 * narrow.norm()


def _drop(name):
    return lambda tensors, config: tensors.pop(name)


def _set(**fields):
    return lambda tensors, config: config.update(fields)


EXPERT = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    "family, change, message",
    [
        ("olmoe", _drop(EXPERT), r"made of mlp.experts.\*.up_proj.weight of 8 experts; those of 5 are missing"),
        (
            "olmoe",
            _drop("model.layers.1.self_attn.q_proj.weight"),
            "tensor model.layers.1.self_attn.q_proj.weight is missing from all of its 1 shards.*there is model.layers",
        ),
        ("olmoe", lambda t, c: t.update(odd=torch.zeros(1)), r"no place for the stored tensor odd \(in model"),
        (
            "olmoe",
            lambda t, c: t.update({"model.norm.weight": torch.ones(65)}),
            r"model.norm.weight has shape \(65,\); the config wants \(64,\)",
        ),
        ("olmoe", _set(scoring_func="sigmoid"), "scoring_func is 'sigmoid', which transformers does not read in olmoe"),
        ("glm4_moe", _set(scoring_func="softmax"), "scoring_func is 'softmax'.*as if it were 'sigmoid'"),
        ("gpt_oss", _set(swiglu_limit=5.0), "swiglu_limit is 5.0.*as if it were 7.0"),
        ("olmoe", _set(moe_layer_freq=2), "moe_layer_freq is 2, which transformers does not read"),
        (
            "olmoe",
            _set(attn_logit_softcapping=30.0),
            "attn_logit_softcapping is 30.0, which trans",
        ),
        ("olmoe", _set(quantization_config={"quant_method": "gptq"}), "quant_method 'gptq'"),
        ("olmoe", _set(hidden_act="tanh"), "the gating of OlmoeExperts is none that experts here have"),
        ("olmoe", _set(model_type="bloom"), "no routed experts were found in a BloomForCausalLM"),
        ("olmoe", _set(model_type="none_such"), "model_type is 'none_such'; known are"),
        ("olmoe", lambda t, c: t.update({"model.norm.weight": t["model.norm.weight"] * torch.nan}), "NaN or infinite"),
    ],
)
def test_what_cannot_be_is_refused_by_name(family, change, message, tmp_path):
    tensors, config = save(tmp_path, make_model(family))
    change(tensors, config)
    write(tmp_path, tensors, config)
    with pytest.raises(CheckpointError, match=rf"^rank 1: (.|\n)*{message}"):
        load(tmp_path, 1, 2)


def test_a_config_of_gpt_oss_as_it_is_published():
    """Older names beside newer ones, and the limit that transformers has as a constant."""
    raw = tiny_family_config("gpt_oss").to_dict()
    del raw["rope_parameters"]
    raw |= {"experts_per_token": 3, "initial_context_length": 4096, "swiglu_limit": 7.0, "rope_theta": 150000}
    raw["rope_scaling"] = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
    raw["rope_scaling"]["original_max_position_embeddings"] = 4096
    raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config, _ = read_config(raw, random_weights=True)
    assert config.rope_parameters == raw["rope_scaling"] | {"rope_theta": 150000}


def test_parts_of_sequences_are_refused(tmp_path):
    save(tmp_path, make_model("olmoe"))
    decoder, _ = load(tmp_path)
    with pytest.raises(Exception, match="olmoe models take whole sequences, but a microbatch has tokens 0 to 5 of 11"):
        decoder.start(decoder.new_step(), IDS[:5], [Piece(0, 0, 5, 11)])


def test_a_forward_that_nobody_ends_leaves_no_thread(tmp_path):
    import gc
    import threading

    save(tmp_path, make_model("olmoe"))
    decoder, _ = load(tmp_path)
    before = threading.active_count()
    for _ in range(5):
        state = decoder.start(decoder.new_step(), IDS, [Piece(0, 0, 11, 11)])
        decoder.attend(state, 0, None)
        (baton,) = [batch.forward._baton for batch in state.batches]
        del state
        gc.collect()
        assert baton.caller.acquire(timeout=60)  # its thread is free
    assert threading.active_count() <= before + 1  # the thread of one forward serves the next


def test_reading_is_reported(tmp_path, caplog):
    save(tmp_path, make_model("olmoe"))
    with caplog.at_level(logging.INFO, "pipemoe"):
        load(tmp_path)
    assert any("GB/s" in record.message for record in caplog.records)


def test_checkpoint_reads_only_slices(tmp_path):
    save(tmp_path, make_model("gpt_oss"))
    with Checkpoint(tmp_path) as checkpoint:
        name = "model.layers.0.mlp.experts.gate_up_proj"
        read = checkpoint.read([name], checkpoint.tensors[name].shape, range(2, 4))
        assert read.shape[0] == 2 and checkpoint.bytes_read == read.nbytes


def test_vocabulary(tmp_path):
    save(tmp_path, make_model("gpt_oss"))
    assert load(tmp_path)[0].vocab_size == VOCAB
