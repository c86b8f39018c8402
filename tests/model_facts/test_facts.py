"""The one reader of configs: as transformers' own modules are built, with the same defaults, and odd fields named."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import CheckpointError, ConfigError
from pipemoe.model_facts import facts as model_facts
from pipemoe.model_facts.dimensions import dimensions_of
from pipemoe.model_facts.facts import cut_config, read_facts, with_defaults_for_nulls
from pipemoe.model_facts.known_models import MODEL_CONFIGS
from pipemoe.model_facts.limits import supported_facts
from pipemoe.models.config import read_config
from pipemoe.models.families import check_config, find_family
from pipemoe.models.skeleton import build_skeleton

SMALL = {
    "qwen3_moe": dict(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
    ),
    "mixtral": dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4
    ),
    "deepseek_v3": dict(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=16,
        kv_lora_rank=8,
        q_lora_rank=8,
    ),
}
SMALL = {
    family: {"model_type": family, "vocab_size": 64, "intermediate_size": 16} | fields
    for family, fields in SMALL.items()
}


NULLABLE = ("mlp_only_layers", "head_dim", "tie_word_embeddings")


def some(draw, name, strategy):
    """A list of a value, of null where that is taken, or of nothing at all."""
    kind = draw(st.sampled_from(("value", "value", "null" if name in NULLABLE else "value", "missing")))
    return [] if kind == "missing" else [None if kind == "null" else draw(strategy)]


@st.composite
def configs(draw):
    """Configs of the three families, small where they say something, with fields missing and null."""
    family = draw(st.sampled_from(model_facts.MODEL_TYPES))
    heads = draw(st.sampled_from((1, 2, 4, 8)))
    config = {
        "model_type": family,
        "vocab_size": 64,
        "hidden_size": 16 * heads,
        "num_attention_heads": heads,
        "intermediate_size": 16,
    }
    config["num_hidden_layers"] = draw(st.integers(1, 6))
    fields = {"max_position_embeddings": st.integers(1, 9999), "tie_word_embeddings": st.booleans()}
    config["num_key_value_heads"] = draw(st.sampled_from([None, *(n for n in (1, 2, 4, 8) if heads % n == 0)]))
    if family == "deepseek_v3":
        config |= {
            "num_key_value_heads": draw(st.sampled_from((None, heads))),
            "kv_lora_rank": 8,
            "moe_intermediate_size": draw(st.integers(1, 9)),
        }
        config |= {draw(st.sampled_from(("n_routed_experts", "num_local_experts"))): draw(st.sampled_from((16, 32)))}
        config |= {"q_lora_rank": draw(st.sampled_from((None, 8))), "n_group": draw(st.sampled_from((1, 2, 8)))}
        config["topk_group"] = config["n_group"]
        fields |= {
            "first_k_dense_replace": st.integers(0, 5),
            "n_shared_experts": st.integers(1, 3),
            "v_head_dim": st.integers(1, 20),
        }
        fields |= {
            "qk_nope_head_dim": st.integers(1, 20),
            "qk_rope_head_dim": st.sampled_from((2, 8)),
            "num_experts_per_tok": st.integers(1, 8),
        }
    else:
        experts = draw(st.sampled_from(("num_experts", "num_local_experts")))
        fields |= {
            experts: st.integers(8, 20),
            "num_experts_per_tok": st.integers(1, 8),
            "head_dim": st.sampled_from((2, 16, 24)),
        }
    if family == "qwen3_moe":
        config["moe_intermediate_size"] = draw(st.integers(1, 9))
        fields |= {"mlp_only_layers": st.lists(st.integers(0, 7), max_size=3), "decoder_sparse_step": st.integers(1, 3)}
    for name, strategy in fields.items():
        for value in some(draw, name, strategy):
            config[name] = value
    return config


@settings(deadline=None, max_examples=40)
@given(configs())
def test_counts_are_those_of_the_modules_that_transformers_builds(config):
    try:
        facts = supported_facts(config)
    except ConfigError as error:
        with pytest.raises(CheckpointError) as refused:
            read_config(config, random_weights=True)
        assert str(error) in str(refused.value)  # plan and load refuse the same
        return
    built, _ = read_config(config, random_weights=True)
    family = check_config(built)
    with torch.device("meta"):
        model = build_skeleton(built, attention="sdpa")
    layers = model.model.layers
    moe = [i for i, layer in enumerate(layers) if hasattr(layer.mlp, "experts")]
    assert list(facts.moe_layers) == moe == family.moe_layers(built) and facts.num_layers == len(layers)
    block = layers[moe[0]]
    assert tuple(block.mlp.experts.gate_up_proj.shape) == (facts.num_experts, 2 * facts.intermediate, facts.hidden)
    assert (facts.num_experts, facts.top_k, facts.intermediate) == (
        family.num_experts(built),
        block.mlp.gate.top_k,
        family.intermediate(built),
    )
    assert (
        model.model.embed_tokens.weight.shape[0] == facts.vocabulary
        and built.tie_word_embeddings == facts.ties_embeddings
    )
    assert built.max_position_embeddings == facts.positions
    shared = getattr(block.mlp, "shared_experts", None)
    assert facts.shared_intermediate == (shared.gate_proj.weight.shape[0] if shared is not None else 0)
    for i in set(range(len(layers))) - set(moe):
        assert layers[i].mlp.gate_proj.weight.shape[0] == facts.dense_intermediate
    attention = block.self_attn
    weights = sum(p.numel() for name, p in attention.named_parameters() if p.ndim == 2)
    if facts.latent:
        assert attention.qk_head_dim == facts.head_dim and attention.num_heads == facts.num_heads
    else:
        assert attention.q_proj.weight.shape[0] == facts.num_heads * facts.head_dim
        assert attention.k_proj.weight.shape[0] == facts.num_key_value_heads * facts.head_dim
    # What plans are made of.
    dimensions = dimensions_of(config)
    between = len(layers) - len(moe) - facts.num_dense_layers_first
    of_dense = weights + 3 * facts.hidden * facts.dense_intermediate
    per_layer = weights + 3 * facts.hidden * facts.shared_intermediate + block.mlp.gate.weight.numel()
    assert dimensions.dense_weights == per_layer + between * of_dense // len(moe)
    assert (dimensions.shape.num_layers, dimensions.num_dense_layers) == (len(moe), facts.num_dense_layers_first)
    assert dimensions.dense_layer_weights == (of_dense if facts.num_dense_layers_first else 0)
    assert dimensions_of(built.to_dict()) == dimensions


@pytest.mark.parametrize("family", model_facts.MODEL_TYPES)
def test_defaults_are_those_of_transformers(family):
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[family]()
    for name, (value, _) in model_facts._COUNTS[family].items():
        assert (
            getattr(default, "n_routed_experts" if (family, name) == ("deepseek_v3", "num_experts") else name) == value
        ), name
    assert read_facts({"model_type": family}) == read_facts(default.to_dict())


def test_fewer_layers_have_experts_than_there_are_layers():
    """`plan` once counted all 94 decoder layers, load_model 46."""
    sparse = MODEL_CONFIGS["qwen3-235b-a22b"] | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    assert dimensions_of(sparse).shape.num_layers == 46 and dimensions_of(sparse).num_dense_layers == 3


# Fields in which transformers takes no null, or breaks at it later, and null has the meaning that it has elsewhere.
LENIENT = {"num_key_value_heads", "head_dim", *model_facts.FLAGS}


@pytest.mark.parametrize("family", model_facts.MODEL_TYPES)
def test_null_is_what_transformers_makes_of_it(family):
    """Every field of the family: where transformers takes null, the same model is read here. Where it does not, one
    that decides what is computed is refused by name.
    """
    from transformers import CONFIG_MAPPING

    def content(config):
        without_effect = ("return_dict", "num_nextn_predict_layers", "pretraining_tp", "qk_head_dim")
        known = {k: v or None for k, v in config.to_dict().items() if k not in without_effect}
        return {k: v for k, v in known.items() if k not in ("head_dim", "layer_types")}

    base = {k: v for k, v in SMALL[family].items() if k != "model_type"} | {"num_experts_per_tok": 2}
    fields = {*CONFIG_MAPPING[family]().to_dict(), *model_facts._COUNTS[family], *model_facts.FLAGS, "rope_scaling"}
    experts = next(name for name in model_facts._EXPERTS if name in base)
    deciding = {*model_facts._COUNTS[family], "hidden_act", "rms_norm_eps", "rope_theta"} - LENIENT - {"q_lora_rank"}
    deciding |= {"routed_scaling_factor"} if family == "deepseek_v3" else set()
    deciding = deciding - {*model_facts._EXPERTS} | {experts}
    for name in sorted((fields - {"model_type", "transformers_version", *model_facts._EXPERTS}) | deciding):
        raw = base | {name: None}
        if name in deciding:
            for read in (dimensions_of, lambda c: read_config(c, random_weights=True)):
                with pytest.raises((ConfigError, CheckpointError), match=f"{name} is null"):
                    read({"model_type": family} | raw)
            continue
        ours, _ = read_config({"model_type": family} | raw, random_weights=True)
        try:
            theirs = CONFIG_MAPPING[family].from_dict(raw)
        except Exception:
            assert not getattr(ours, name) or name not in model_facts.FLAGS
            continue
        assert content(ours) == content(theirs), name


def test_huge_counts_are_refused_before_anything_is_built():
    for family in model_facts.MODEL_TYPES:
        for name, value in (("num_hidden_layers", 1 << 21), ("head_dim", 1 << 30), ("qk_rope_head_dim", 1 << 30)):
            if name.endswith("head_dim") and (name == "head_dim") == (family == "deepseek_v3"):
                continue
            with pytest.raises(ConfigError, match=f"^{name} is {value}; .* at most"):
                dimensions_of(SMALL[family] | {name: value})
            with pytest.raises(CheckpointError, match=f"{name} is {value}; .* at most"):
                read_config(SMALL[family] | {name: value}, random_weights=True)


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_a_config_saved_by_transformers_is_the_published_one(name, tmp_path):
    """transformers 5 writes other names than the published file has."""
    from transformers import CONFIG_MAPPING

    published = dict(MODEL_CONFIGS[name])
    fields = {k: v for k, v in published.items() if k != "model_type"}
    CONFIG_MAPPING[published["model_type"]].from_dict(fields).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert dimensions_of(saved) == dimensions_of(published)
    assert supported_facts(saved) == supported_facts(published)


@pytest.mark.parametrize("family", model_facts.MODEL_TYPES)
def test_null_heads_are_one_for_each_query_head(family):
    facts = read_facts(SMALL[family] | {"num_key_value_heads": None})
    assert facts.num_key_value_heads == facts.num_heads == 4


@pytest.mark.parametrize("family", model_facts.MODEL_TYPES)
@pytest.mark.parametrize("value", ["7", 7.0, True, -1, 0, 1 << 60, [7], float("nan"), {}])
def test_odd_counts_are_named(family, value):
    for name in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "vocab_size",
        "num_local_experts",
    ):
        config = {k: v for k, v in SMALL[family].items() if k not in ("num_experts", "n_routed_experts")} | {
            name: value
        }
        with pytest.raises(
            ConfigError,
            match=f"^{'num_experts' if name == 'num_local_experts' else name} is .*; it must be a whole number, at "
            "least 1",
        ):
            read_facts(config)
        with pytest.raises(
            CheckpointError,
            match="^rank 2: the config given: num" if name.startswith("num") else f"^rank 2: the config given: {name}",
        ):
            read_config(config, "rank 2: ", random_weights=True)


# What a config asks for and its family does not do: field, value, and what the message holds.
REFUSED = {
    "any": [
        ("hidden_act", "gelu", "hidden_act is 'gelu'.*'silu'"),
        ("mlp_bias", True, "mlp_bias is True"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping is 50.0"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping is 30.0"),
        ("logit_scale", 0.1, "logit_scale is 0.1"),
        ("dual_chunk_attention_config", {"chunk_size": 8}, "dual_chunk_attention_config .*not done"),
        ("compression_config", {"format": "x"}, "compression_config"),
        ("ep_size", 8, "ep_size is 8"),
        ("moe_layer_freq", 2, "moe_layer_freq is 2"),
        ("rms_norm_eps", "small", "rms_norm_eps is 'small'; it must be a number"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan"),
        ("tie_word_embeddings", "no", "tie_word_embeddings is 'no'; it must be true or false"),
        ("rope_theta", -1.0, "rope_theta is -1.0"),
        ("rope_scaling", "linear", "rope_scaling is 'linear'; it must be an object"),
        ("rope_scaling", {"type": "su", "factor": 2.0}, "rope_type is 'su', which depends on batch neighbours"),
        ("rope_scaling", {"type": "longrope", "factor": 2.0}, "rope_type is 'longrope', which depends"),
        (
            "rope_scaling",
            {"type": "mrope", "mrope_section": [1, 1]},
            "rope_type is 'mrope'; default, linear, llama3, yarn are done",
        ),
        ("rope_scaling", {"type": ["yarn"]}, "rope_type is"),
        ("rope_scaling", {"factor": 4.0}, "factor is 4.0, which rope_type 'default' does not have"),
        (
            "rope_scaling",
            {"type": "linear", "factor": 2.0, "mrope_section": [1]},
            "mrope_section is .* rope_type 'linear' does not have",
        ),
        ("rope_scaling", {"type": "linear"}, "factor is None; rope_type 'linear' needs one"),
        ("rope_scaling", {"type": "yarn", "factor": "4"}, "factor is '4'"),
        (
            "rope_scaling",
            {"type": "yarn", "rope_type": "linear", "factor": 4.0},
            "rope_type is 'linear', but type is 'yarn'",
        ),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'.*bfloat16"),
        ("quantization_config", {"quant_method": "awq"}, "quant_method 'awq'"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method 'bitsandbytes'"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "quant_method 'compressed-tensors'"),
        (
            "quantization_config",
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
            "activation_scheme is 'static'",
        ),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size 128"),
    ],
    "qwen3_moe": [
        ("scoring_func", "sigmoid", "scoring_func is 'sigmoid'.*'softmax'"),
        ("n_shared_experts", 1, "n_shared_experts is 1"),
        ("shared_expert_intermediate_size", 64, "shared_expert_intermediate_size is 64"),
        ("qkv_bias", True, "qkv_bias is True"),
        ("use_qk_norm", False, "use_qk_norm is False"),
        ("mlp_only_layers", ["0"], "mlp_only_layers is '0'"),
        ("mlp_only_layers", [-1], "mlp_only_layers is -1"),
        ("mlp_only_layers", [0, 1, 2], "none of the 3 decoder layers has routed experts"),
        ("mlp_only_layers", 3, "mlp_only_layers is 3; it must be a list"),
        ("decoder_sparse_step", 0, "decoder_sparse_step is 0"),
        ("head_dim", 7, "head_dim is 7; .*even"),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"], "layer_types is .*'full_attention'"),
        ("layer_types", ["linear_attention"] * 3, "layer_types is"),
        ("num_local_experts", 8, "num_experts is 4 and num_local_experts is 8; they must be the same"),
        ("norm_topk_prob", "yes", "norm_topk_prob is 'yes'"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3; it must divide"),
        ("num_experts_per_tok", 5, "num_experts_per_tok is 5, more than the 4 experts"),
    ],
    "mixtral": [
        ("attention_bias", True, "attention_bias is True"),
        ("norm_topk_prob", False, "norm_topk_prob is False"),
        ("first_k_dense_replace", 1, "first_k_dense_replace is 1"),
        ("mlp_only_layers", [0], r"mlp_only_layers is \[0\]"),
        ("sliding_window", 0, "sliding_window is 0"),
        ("sliding_window", "4096", "sliding_window is '4096'"),
        ("hidden_size", 33, "hidden_size is 33.*head_dim"),
    ],
    "deepseek_v3": [
        ("scoring_func", "softmax", "scoring_func is 'softmax'.*'sigmoid'"),
        ("topk_method", "greedy", "topk_method is 'greedy'.*'noaux_tc'"),
        ("topk_method", "group_limited_greedy", "topk_method"),
        ("sliding_window", 128, "sliding_window is 128"),
        ("n_group", 3, "n_group is 3; it must divide"),
        ("n_group", None, "n_group is null; say 1"),
        ("n_group", 16, "n_group is 16"),
        ("topk_group", 9, "topk_group is 9; it must be at most n_group"),
        ("topk_group", 1, "topk_group is 1.*must hold 8 experts"),
        ("first_k_dense_replace", 4, "none of the 4 decoder layers"),
        ("num_key_value_heads", 2, "num_key_value_heads is 2.*each of the 4 heads"),
        ("head_dim", 128, "head_dim is 128; in deepseek_v3 it is qk_rope_head_dim"),
        ("n_shared_experts", 0, "n_shared_experts is 0"),
        ("qk_rope_head_dim", 7, "qk_rope_head_dim is 7"),
        ("q_lora_rank", 0, "q_lora_rank is 0"),
        ("num_experts", 8, "n_routed_experts is 16"),
        ("use_mla", False, "use_mla is False"),
    ],
}


@pytest.mark.parametrize("family", model_facts.MODEL_TYPES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_family_does_not_do_is_refused_by_name(family, kind):
    for name, value, message in REFUSED[kind] if kind in ("any", family) else ():
        config = SMALL[family] | {name: value}
        with pytest.raises(ConfigError, match=message):
            dimensions_of(config)
        with pytest.raises(CheckpointError, match=f"^rank 2: (.*){message}"):
            read_config(config, "rank 2: ", random_weights=True)


def test_what_changes_nothing_is_accepted():
    plain = {
        "auto_map": {"AutoModel": "x.Y"},
        "torch_dtype": "bfloat16",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "num_nextn_predict_layers": 1,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "scoring_func": None,
        "architectures": ["X"],
        "attention_dropout": 0.5,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    }
    for family in model_facts.MODEL_TYPES:
        assert supported_facts(SMALL[family] | plain) == supported_facts(SMALL[family])
    window = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 48}
    assert supported_facts(SMALL["qwen3_moe"] | window)
    with pytest.raises(ConfigError, match="max_window_layers is 48; a sliding window of some layers alone"):
        supported_facts(SMALL["qwen3_moe"] | window | {"use_sliding_window": True})


def test_fields_that_nobody_knows_are_said(caplog):
    with caplog.at_level(logging.INFO, "pipemoe"):
        supported_facts(SMALL["mixtral"] | {"warp_factor": 9, "impulse": None})
    assert "warp_factor" in caplog.text and "impulse" not in caplog.text


def test_experts_are_counted_under_the_name_that_transformers_knows():
    raw = SMALL["deepseek_v3"].copy()
    raw["num_experts"] = raw.pop("n_routed_experts")
    assert read_config(raw, random_weights=True)[0].n_routed_experts == read_facts(raw).num_experts == 16
    assert with_defaults_for_nulls({"model_type": "other", "a": None, "b": 1}) == {"model_type": "other", "b": 1}


def test_a_config_is_cut_to_its_first_layers():
    config = SMALL["qwen3_moe"] | {
        "decoder_sparse_step": 2,
        "num_hidden_layers": 8,
        "layer_types": ["full_attention"] * 8,
    }
    facts = read_facts(config)
    assert facts.moe_layers == (1, 3, 5, 7) and [facts.layers_for(n) for n in (1, 2, 9)] == [2, 4, 8]
    cut = cut_config(config, 4)
    assert read_facts(cut).moe_layers == (1, 3) and len(cut["layer_types"]) == 4 and config["num_hidden_layers"] == 8


def test_the_reader_needs_neither_transformers_nor_torch():
    names = "pipemoe.model_facts.facts, pipemoe.model_facts.limits, pipemoe.model_facts.known_models"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, {names}; print([m for m in ('torch', 'transformers', 'mpi4py') if m in "
                               "sys.modules])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(found.stdout.replace("'", '"')) == []


def test_families_here_are_those_that_are_loaded():
    from pipemoe.models.families import MODULES

    assert set(model_facts.MODEL_TYPES) == set(MODULES)
    assert all(find_family(name).model_type == name for name in model_facts.MODEL_TYPES)
