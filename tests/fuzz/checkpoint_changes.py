"""Ways to change or damage a checkpoint on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from pipemoe.models.checkpoint import INDEX
from tests.fuzz.case import ODD, WRONG
from tests.models.tiny import FAMILIES

_ODD_JSON = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    1.5,
    1e400,
    float("nan"),
    "",
    "x",
    "7",
    [],
    [1],
    {},
    {"a": 1},
    2**31,
    2**63,
    10**30,
    "\ud800",
)
_ADDED_KEYS = {
    **{
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "first_k_dense_replace": 0,
        "attention_bias": True,
        "sliding_window": 4,
    },
    **{
        "tie_word_embeddings": True,
        "scoring_func": "softmax",
        "moe_layer_freq": 2,
        "hidden_act": "gelu",
        "torch_dtype": "float64",
    },
    **{
        "dtype": "nonsense",
        "quantization_config": {},
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "rope_parameters": None,
    },
    **{
        "head_dim": 7,
        "num_experts_per_tok": 9,
        "n_group": 3,
        "topk_method": "greedy",
        "use_sliding_window": True,
        "router_jitter_noise": 0.5,
    },
    **{
        "auto_map": {"AutoConfig": "evil.Config"},
        "architectures": ["Evil"],
        "trust_remote_code": True,
        "unheard_of": [1, 2],
    },
    **{
        "attn_implementation": "eager",
        "_attn_implementation": "sdpa",
        "output_router_logits": True,
        "partial_rotary_factor": 0.5,
    },
    **{
        "norm_topk_prob": False,
        "routed_scaling_factor": 2.5,
        "topk_group": 1,
        "rms_norm_eps": 0.1,
        "initializer_range": -1,
    },
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
        raw[key] = random.choice(
            (
                raw[key] + 1,
                raw[key] - 1,
                -raw[key],
                2 * raw[key],
                str(raw[key]),
                float(raw[key]),
                [raw[key]],
                raw[key] << 20,
            )
        )
        what = f"config.json's {key} is {raw[key]!r}"
    elif kind == 10:
        raw["model_type"] = random.choice((*FAMILIES, "llama", "qwen2_moe", None, 7, [], "", "Qwen3_MoE"))
        what = f"config.json's model_type is {raw['model_type']!r}"
    else:
        text = file.read_text()
        texts = {
            **{
                "empty": b"",
                "half": text[: len(text) // 2].encode(),
                "a list": b"[]",
                "null": b"null",
                "no text": b"\xff\xfe\x00",
                "a string": b'"x"',
            },
            **{
                "deep": b"[" * 100_000,
                "twice": (text + text).encode(),
                "with a byte order mark": b"\xef\xbb\xbf" + text.encode(),
            },
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
    kind = random.choice(
        (
            "truncated",
            "renamed",
            "bytes",
            "missing",
            "dtype",
            "shape",
            "values",
            "extra",
            "index",
            "index entry",
            "single",
            "a folder",
        )
    )
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
        value = random.choice(
            (
                None,
                7,
                "",
                "..",
                "../other.safetensors",
                "/etc/hostname",
                "a\0b",
                "config.json",
                ["x"],
                "nowhere.safetensors",
                "\ud800",
                ".",
            )
        )
        index["weight_map"][name] = value
        rewrite(folder / INDEX, json.dumps(index).encode())
        return f"index: {name} is in {value!r}", ODD
    contents = {
        "empty": b"",
        "a list": b"[]",
        "without weight_map": b"{}",
        "weight_map is a list": b'{"weight_map": []}',
        "weight_map is empty": b'{"weight_map": {}}',
    }
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
        dtype = random.choice(
            (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int8,
                torch.int64,
                torch.bool,
                torch.float8_e4m3fn,
                torch.complex64,
            )
        )
        tensors[name] = tensor.to(dtype)
        what = f"{name} is {dtype}"
    elif kind == "shape":
        shapes = (
            tensor[:-1],
            tensor[None],
            tensor.flatten(),
            tensor.t() if tensor.dim() == 2 else tensor[:1],
            tensor[:0],
            tensor.flatten()[0],
        )
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
