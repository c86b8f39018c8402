"""Random weights by name: every rank and the reference model make the same ones without exchanging anything.

Parameter p has its own generator, seeded with hash(seed, name of p); expert e of MoE layer l has two, seeded with
hash(seed, l, e, projection). Values are drawn in float32 on the device and then rounded to the dtype, so that models of
different dtypes agree up to rounding. Devices of different types draw different values.

Scales follow the fan-in, so a wrong expert shows in a float32 parity check by orders of magnitude. Router and experts
also have gains. Rounding to bfloat16 flips near-ties of the router; with a decided router and quiet experts such a flip
stays small against the residual, as in trained models.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipemoe.experts.weights import ExpertWeights
from pipemoe.models.config import read_config
from pipemoe.models.families import check_config
from pipemoe.models.skeleton import build_skeleton, materialise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


ROUTER_GAIN = 2.0
EXPERT_GAIN = 0.1


def _generator(device: torch.device, *key: object) -> torch.Generator:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def random_parameter(
    name: str, shape: torch.Size, *, seed: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """One parameter or buffer outside the routed experts: a function of (seed, name, shape, device type)."""
    values = torch.empty(shape, dtype=torch.float32, device=device)
    values.normal_(generator=_generator(device, seed, name))
    if name.endswith("norm.weight"):
        values.mul_(0.1).add_(1.0)
    elif "embed_tokens" in name:
        pass
    elif name.endswith("mlp.gate.weight"):
        values.mul_(ROUTER_GAIN * shape[-1] ** -0.5)
    elif len(shape) == 2:
        values.mul_(shape[-1] ** -0.5)
    else:  # biases, of projections and of the router's choice
        values.mul_(0.1)
    return values.to(dtype)


def fill_random_expert(gate_up: torch.Tensor, down: torch.Tensor, layer: int, expert: int, seed: int) -> None:
    """Fill one expert's gate_up [2I, H] and down [H, I]: functions of (seed, layer, expert, shape, device type)."""
    for projection, target, gain in (("gate_up", gate_up, 1.0), ("down", down, EXPERT_GAIN)):
        values = torch.empty(target.shape, dtype=torch.float32, device=target.device)
        generator = _generator(target.device, seed, layer, expert, projection)
        values.normal_(0.0, gain * target.shape[-1] ** -0.5, generator=generator)
        target.copy_(values)


def random_experts(
    layer: int,
    experts: range,
    *,
    hidden: int,
    intermediate: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> ExpertWeights:
    """The weights of MoE layer `layer` for the global ids `experts`."""
    gate_up = torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype, device=device)
    down = torch.empty(len(experts), hidden, intermediate, dtype=dtype, device=device)
    for local, expert in enumerate(experts):
        fill_random_expert(gate_up[local], down[local], layer, expert, seed)
    return ExpertWeights(gate_up, down, first_expert=experts.start)


def fill_random(model: PreTrainedModel, *, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter and buffer that is still on the meta device its random value."""

    def value(name: str, shape: torch.Size, wanted: torch.dtype) -> torch.Tensor:
        return random_parameter(name, shape, seed=seed, device=device, dtype=wanted)

    materialise(model, value, device=device, dtype=dtype)


def reference_model(
    path_or_config: str | Path | dict | PreTrainedConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    random_weights: bool = False,
) -> PreTrainedModel:
    """The plain transformers model, all experts on one device, with the weights that load_decoder gives the ranks."""
    from transformers import AutoModelForCausalLM

    device = torch.device(device)
    config, directory = read_config(path_or_config, random_weights=random_weights)
    family = check_config(config)
    if directory is not None:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
        return model.to(device).eval()
    model = build_skeleton(config, attention="sdpa")
    moe_layers = family.moe_layers(config)
    every = range(family.num_experts(config))
    shape = dict(hidden=config.hidden_size, intermediate=family.intermediate(config))
    for index, layer in enumerate(moe_layers):
        weights = random_experts(index, every, **shape, seed=seed, device=device, dtype=dtype)
        module = model.model.layers[layer].mlp.experts
        module.gate_up_proj = torch.nn.Parameter(weights.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(weights.down, requires_grad=False)
    fill_random(model, seed=seed, device=device, dtype=dtype)
    return model
