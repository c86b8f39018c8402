"""load_model and with_config: checkpoints damaged or changed on disk, and the arguments beside them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import pipemoe
from pipemoe import Config
from pipemoe.errors import PipemoeError
from pipemoe.models.checkpoint import INDEX
from pipemoe.models.random_weights import reference_model
from pipemoe.plan.dimensions import dimensions_of
from pipemoe.plan.model_configs import model_config
from pipemoe.plan.schedule import COMBINES, MODES, OBJECTIVES
from tests.fuzz.case import ODD, RIGHT, WRONG, Argument, Case, Draw, any_result, wanted_of
from tests.fuzz.odd import odd_number, odd_value
from tests.fuzz.prefill_cases import some_sequences
from tests.fuzz.stage import MOST_TOKENS, POSITIONS, SEED, SETTINGS, SMALL, Stage, judge_prefilled
from tests.models.tiny import FAMILIES, tiny_config

_ODD_JSON = (None, True, False, 0, 1, -1, 2, 3, 1.5, 1e400, float("nan"), "", "x", "7", [], [1], {}, {"a": 1}, 2**31, 2**63, 10**30, "\ud800")
_ADDED_KEYS = {
    **{"mlp_only_layers": [0], "decoder_sparse_step": 2, "first_k_dense_replace": 0, "attention_bias": True, "sliding_window": 4},
    **{"tie_word_embeddings": True, "scoring_func": "softmax", "moe_layer_freq": 2, "hidden_act": "gelu", "torch_dtype": "float64"},
    **{"dtype": "nonsense", "quantization_config": {}, "rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None},
    **{"head_dim": 7, "num_experts_per_tok": 9, "n_group": 3, "topk_method": "greedy", "use_sliding_window": True, "router_jitter_noise": 0.5},
    **{"auto_map": {"AutoConfig": "evil.Config"}, "architectures": ["Evil"], "trust_remote_code": True, "unheard_of": [1, 2]},
    **{"attn_implementation": "eager", "_attn_implementation": "sdpa", "output_router_logits": True, "partial_rotary_factor": 0.5},
    **{"norm_topk_prob": False, "routed_scaling_factor": 2.5, "topk_group": 1, "rms_norm_eps": 0.1, "initializer_range": -1},
}


def linked_copy(source: Path, target: Path) -> None:
    """Files are links until one is written anew."""
    for file in source.iterdir():
        os.link(file, target / file.name)


def rewrite(file: Path, data: bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def change_config(folder: Path, random: Random) -> str:
    """Changes config.json; says how."""
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    kind, key = random.randrange(12), random.choice(sorted(raw))
    if kind < 3:
        raw.pop(key)
        what = f"config.json without {key}"
    elif kind < 6:
        value = random.choice(_ODD_JSON)
        raw[key] = value
        what = f"config.json's {key} is {value!r:.40}"
    elif kind < 9:
        key = random.choice(sorted(_ADDED_KEYS))
        raw[key] = _ADDED_KEYS[key]
        what = f"config.json's {key} is {raw[key]}"
    elif kind == 9:
        whole = [key for key, value in raw.items() if type(value) is int]
        key = random.choice(whole)
        raw[key] = random.choice((raw[key] + 1, raw[key] - 1, -raw[key], 2 * raw[key], str(raw[key]), float(raw[key]), [raw[key]], raw[key] << 20))
        what = f"config.json's {key} is {raw[key]!r}"
    elif kind == 10:
        raw["model_type"] = random.choice((*FAMILIES, "llama", "qwen2_moe", None, 7, [], "", "Qwen3_MoE"))
        what = f"config.json's model_type is {raw['model_type']!r}"
    else:
        text = file.read_text()
        texts = {
            **{"empty": b"", "half": text[: len(text) // 2].encode(), "a list": b"[]", "null": b"null", "no text": b"\xff\xfe\x00", "a string": b'"x"'},
            **{"deep": b"[" * 100_000, "twice": (text + text).encode(), "with a byte order mark": b"\xef\xbb\xbf" + text.encode()},
        }
        name = random.choice(sorted(texts))
        rewrite(file, texts[name])
        return f"config.json is {name}"
    rewrite(file, json.dumps(raw).encode())
    return what


def change_shard(folder: Path, random: Random) -> tuple[str, str]:
    """Damages a shard or the index; says how, and what that means for a rank that needs the tensor."""
    index = json.loads((folder / INDEX).read_text())
    names = sorted(index["weight_map"])
    name = random.choice(names)
    file = folder / index["weight_map"][name]
    kind = random.choice(("truncated", "renamed", "bytes", "missing", "dtype", "shape", "values", "extra", "index", "index entry", "single", "a folder"))
    if kind == "truncated":
        data = file.read_bytes()
        keep = random.choice((0, 4, 8, 100, len(data) // 2, len(data) - 1))
        rewrite(file, data[:keep])
        return f"{file.name} of {keep} bytes", WRONG
    if kind == "renamed":
        file.rename(folder / "other.safetensors")
        return f"{file.name} is not there", WRONG
    if kind == "a folder":
        file.unlink()
        file.mkdir()
        return f"{file.name} is a folder", WRONG
    if kind == "bytes":
        data = bytearray(file.read_bytes())
        at = random.randrange(min(len(data), 300))
        data[at] = random.randrange(256)
        rewrite(file, bytes(data))
        return f"{file.name} with another byte {at}", ODD
    if kind in ("missing", "dtype", "shape", "values", "extra"):
        return _change_tensor(folder, file, name, kind, random), ODD
    if kind == "single":
        (folder / INDEX).unlink()
        return "no index", WRONG
    if kind == "index entry":
        value = random.choice((None, 7, "", "..", "../other.safetensors", "/etc/hostname", "a\0b", "config.json", ["x"], "nowhere.safetensors", "\ud800", "."))
        index["weight_map"][name] = value
        rewrite(folder / INDEX, json.dumps(index).encode())
        return f"index: {name} is in {value!r}", ODD
    contents = {"empty": b"", "a list": b"[]", "without weight_map": b"{}", "weight_map is a list": b'{"weight_map": []}', "weight_map is empty": b'{"weight_map": {}}'}
    what = random.choice(sorted(contents))
    rewrite(folder / INDEX, contents[what])
    return f"index: {what}", WRONG


def _change_tensor(folder: Path, file: Path, name: str, kind: str, random: Random) -> str:
    tensors = load_file(file)
    tensor = tensors[name]
    if kind == "missing":
        del tensors[name]
        what = f"no tensor {name}"
    elif kind == "dtype":
        dtype = random.choice((torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64))
        tensors[name] = tensor.to(dtype)
        what = f"{name} is {dtype}"
    elif kind == "shape":
        shapes = (tensor[:-1], tensor[None], tensor.flatten(), tensor.t() if tensor.dim() == 2 else tensor[:1], tensor[:0], tensor.flatten()[0])
        choice = random.randrange(len(shapes))
        tensors[name] = shapes[choice].clone().contiguous()
        what = f"{name} has shape {tuple(tensors[name].shape)}"
    elif kind == "values":
        bad = random.choice((float("nan"), float("inf"), 1e30, 0.0))
        tensor = tensor.clone()
        tensor.view(-1)[random.randrange(tensor.numel())] = bad
        tensors[name] = tensor
        what = f"{name} holds {bad}"
    else:
        tensors["unheard.of.weight"] = torch.ones(2)
        what = "a tensor more"
    file.unlink()  # it may be mapped, and a link
    save_file(tensors, file)
    return what


def load(draw: Draw, stage: Stage) -> Case:
    """load_model of a changed checkpoint."""
    family = draw.random.choice(FAMILIES)
    source = stage.checkpoint(family)

    def mutated(random: Random) -> Argument:
        folder = stage.new_folder()
        linked_copy(source, folder)
        if random.random() < 0.5:
            return Argument(change_config(folder, random), folder, ODD)
        what, meaning = change_shard(folder, random)
        return Argument(what, folder, meaning)

    arguments = draw.per_rank(mutated, lambda _: Argument("as saved", source))
    folder = arguments[draw.rank].value
    sequences = [some_sequences(draw.random) for _ in range(draw.size)][draw.rank]

    def call() -> Any:
        return pipemoe.load_model(folder, stage.world, config=Config(**SMALL))

    def judge(model: pipemoe.Model) -> str | None:
        return judge_loaded(model, folder, sequences)

    return Case(f"load_model of a checkpoint ({family})", arguments, call, judge, wanted_of(arguments), makes=True)


def judge_loaded(model: pipemoe.Model, folder: Path, sequences: list[list[int]]) -> str | None:
    """A model that loaded must be the one that transformers loads, and planned for as it is."""
    found = model.prefill(sequences, keep_logits=True)
    planned = dimensions_of(model_config(str(folder))).shape
    if planned != model.runtime.shape:
        return f"plan takes it for {planned}, load_model for {model.runtime.shape}"
    try:
        reference = reference_model(folder, "cpu", torch.float32)
    except Exception:  # noqa: BLE001  (what transformers cannot load may be right all the same: another rank's tensor)
        return None
    wanted = [reference(torch.tensor([sequence])).logits[0, -1].float() for sequence in sequences]
    if not all(bool(torch.isfinite(logits).all()) for logits in wanted):
        return None
    return judge_prefilled(reference, found, sequences)


def load_arguments(draw: Draw, stage: Stage) -> Case:
    """load_model with a right checkpoint or config, and odd arguments beside; or an odd thing in the place of a checkpoint."""
    family = draw.random.choice(FAMILIES)
    source = stage.checkpoint(family)
    config = Config(**SMALL)

    def mutated(random: Random) -> Argument:
        what, value = odd_value(random)
        number, odd = odd_number(random, 3)
        tiny = tiny_config(family, num_layers=2, max_position_embeddings=POSITIONS)
        key = random.choice(sorted(tiny.to_dict()))
        changed = tiny_config(family, num_layers=2, max_position_embeddings=POSITIONS)
        try:
            setattr(changed, key, value)
        except Exception:  # noqa: BLE001  (transformers checks some)
            key = None
        choices: dict[str, tuple[dict[str, Any], str, Any]] = {
            "a string path": ({"path_or_config": str(source)}, RIGHT, ""),
            "a path of config.json": ({"path_or_config": source / "config.json"}, WRONG, None),
            "a path of a shard": ({"path_or_config": next(source.glob("*.safetensors"))}, WRONG, None),
            "a path that is not there": ({"path_or_config": source / "nowhere"}, WRONG, None),
            "a relative path of nothing": ({"path_or_config": "no/such/model"}, WRONG, None),
            "a dict": ({"path_or_config": tiny.to_dict()}, WRONG, None),
            "a dict, for random weights": ({"path_or_config": tiny.to_dict(), "seed": SEED, "random_weights": True}, RIGHT, "random"),
            "a path of config.json, for random weights": ({"path_or_config": source / "config.json", "random_weights": True, "seed": SEED}, RIGHT, "json"),
            f"random_weights is {what}": ({"random_weights": value}, ODD, None),
            "an empty folder": ({"path_or_config": stage.folder}, WRONG, None),
            "random weights": ({"path_or_config": tiny, "seed": SEED}, RIGHT, "random"),
            f"path_or_config is {what}": ({"path_or_config": value}, ODD, None),
            f"a config whose {key} is {what}": ({"path_or_config": changed}, ODD, None),
            f"config is {what}": ({"config": value}, ODD, None),
            f"world is {what}": ({"world": value}, WRONG, None),
            f"dtype is {what}": ({"dtype": value}, ODD, None),
            "dtype is float64": ({"dtype": torch.float64}, WRONG, None),
            "dtype is int8": ({"dtype": torch.int8}, WRONG, None),
            "dtype is a string": ({"dtype": "float32"}, ODD, None),
            "dtype is bfloat16": ({"dtype": torch.bfloat16}, RIGHT, "bfloat16"),
            f"seed is {what}": ({"path_or_config": tiny, "seed": value}, ODD, None),
            f"seed is {number}": ({"path_or_config": tiny, "seed": odd}, ODD, None),
        }
        name = random.choice(list(choices))
        passed, meaning, same = choices[name]
        return Argument(name, passed, meaning, same)

    arguments = draw.per_rank(mutated, lambda _: Argument("nothing odd", {}, RIGHT, ""))
    sequences = [some_sequences(draw.random) for _ in range(draw.size)][draw.rank]

    def call() -> Any:
        return pipemoe.load_model(**({"path_or_config": source, "world": stage.world, "config": config} | arguments[draw.rank].value))

    def judge(model: pipemoe.Model) -> str | None:
        found = model.prefill(sequences)
        return judge_prefilled(family, found, sequences) if all(a.same in ("", "random") for a in arguments) else None

    return Case(f"load_model ({family})", arguments, call, judge, wanted_of(arguments), makes=True)


# --- Config and with_config

_VALUES: dict[str, tuple[Any, ...]] = {
    "mode": MODES,
    "moe_max_num_tokens": (1, 2, 7, 96, 1000),
    "max_tokens_per_rank": (60, 96, 500),
    "num_slots": (None, 1, 2, 4),
    "combine": COMBINES,
    "pipelined_ratio": (1, 2, 100),
    "objective": OBJECTIVES,
    "objective_weights": ((1, 0, 0), (0, 0, 100)),
    "makespan_budget": (0, 0.0, 1.5, 100),
    "combine_blocks": (None, 1, 2),
    "arrivals": (None, False),
    "num_sms": (None,),
    "dispatch_dtype": (None,),
    "combine_dtype": (None, "float32"),
    "deterministic": (False, True),
    "experts": ("auto",),
    "graph_tokens": (0, 1, 4096),
    "debug": (False, True),
    "cost": (None,),
}
_ODD_VALUES: dict[str, tuple[Any, ...]] = {
    "mode": ("", "AUTO", "auto ", "none"),
    "moe_max_num_tokens": (10**9, 2**31, 2**62),
    "max_tokens_per_rank": (1, 10**9, 2**31, 2**62),
    "num_slots": (5, 2000, 2**40),
    "combine_blocks": (9, 64, 1000),
    "arrivals": (True,),
    "num_sms": (1, 10**6),
    "dispatch_dtype": ("float8_e4m3fn", "float32", torch.float8_e4m3fn),
    "combine_dtype": ("bfloat16", "float16", "float64", torch.float32),
    "experts": ("host", "hopper", "hopper_fp8", "torch_cuda", "ampere", "", "nonsense"),
    "graph_tokens": (10**12, -1),
    "cost": ("nowhere.json", "", ".", "/dev/null", "a\0b"),
    "objective_weights": ((0, 0, 0), (1, 1), (1, 1, 101), [1, 1, 0]),
    "makespan_budget": (float("nan"), -0.1, 101, float("inf"), True),
}


def _settings(random: Random) -> Argument:
    """Arguments of Config, most of them right."""
    chosen = {name: random.choice(_VALUES[name]) for name in random.sample(list(_VALUES), random.randrange(5))}
    chosen = {**SMALL, **chosen}
    name = random.choice([f.name for f in dataclasses.fields(Config)])
    kind = random.randrange(5)
    if kind == 0:
        return Argument(f"right values of {', '.join(chosen)}", chosen, ODD if {*chosen} & {"combine_blocks", "num_slots"} else RIGHT, repr(sorted(chosen.items())))
    if kind == 1 and name in _ODD_VALUES:
        value = random.choice(_ODD_VALUES[name])
        what = f"{value!r}"
    elif kind == 2:
        what, value = odd_number(random, 7)
    else:
        what, value = odd_value(random)
    return Argument(f"{name} is {what}", chosen | {name: value}, ODD)


def config(draw: Draw, stage: Stage) -> Case:
    """Config(...), a matter of one rank; where all ranks' can be made, a model with it."""
    family = draw.random.choice(FAMILIES)
    arguments = draw.per_rank(_settings, lambda _: Argument("nothing odd", SMALL, RIGHT, repr(sorted(SMALL.items()))))
    model = stage.model(family, 0)
    sequences = [[1, 2, 3], [4]]
    try:
        configs = [Config(**a.value) for a in arguments]
    except PipemoeError:
        configs = []
    except Exception as error:  # noqa: BLE001  (judged below)
        return Case("Config(...)", arguments, lambda error=error: _again(error), any_result, ODD, is_local=True)
    if not configs:
        return Case("Config(...)", arguments, lambda: Config(**arguments[draw.rank].value), any_result, ODD, is_local=True)

    def judge(with_it: pipemoe.Model) -> str | None:
        found = with_it.prefill(sequences, keep_logits=True)
        return judge_prefilled(family, found, sequences) if _is_exact(configs[draw.rank]) else None

    return Case("model.with_config", arguments, lambda: model.with_config(configs[draw.rank]), judge, wanted_of(arguments), makes=True)


def _is_exact(made: Config) -> bool:
    return made.dispatch_dtype is None and made.experts != "hopper_fp8" and made.combine_dtype in (None, "float32")


def _again(error: BaseException) -> str:
    raise error


def with_config(draw: Draw, stage: Stage) -> Case:
    """with_config of what is no Config."""
    model = stage.model(draw.random.choice(FAMILIES), draw.random.randrange(len(SETTINGS)))

    def mutated(random: Random) -> Argument:
        what, value = odd_value(random)
        return Argument(f"config is {what}", value, WRONG)

    arguments = draw.per_rank(mutated, lambda _: Argument("nothing odd", Config(max_tokens_per_rank=MOST_TOKENS)))
    mine = arguments[draw.rank].value
    return Case("model.with_config of no Config", arguments, lambda: model.with_config(mine), any_result, wanted_of(arguments), makes=True)


