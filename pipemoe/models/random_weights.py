"""Random weights of whole transformers models: of families without a file, and of the reference to compare with.

Values are those of random_parameters, functions of names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipemoe.models.config import read_config
from pipemoe.models.experts_form import ExpertsSite, Matrix
from pipemoe.models.families import MODULES, check_config
from pipemoe.models.find_experts import find_experts
from pipemoe.models.random_parameters import (
    ATTENTION_GAIN,
    EXPERT_GAIN,
    Gains,
    fill_random,
    random_experts,
    random_parameter,
)
from pipemoe.models.routing import RoutingSpec
from pipemoe.models.skeleton import build_skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def gains_of_whole(sites: Sequence[ExpertsSite], config: PreTrainedConfig, router_skew: float = 0.0) -> Gains:
    """Of a family that no file states."""
    spec = RoutingSpec(num_experts=sites[0].num_experts, top_k=sites[0].top_k)
    return Gains(ATTENTION_GAIN * config.num_hidden_layers**-0.5, spec, router_skew)


def random_expert(
    name: str,
    site: ExpertsSite,
    matrix: Matrix,
    shape: tuple[int, ...],
    expert: int,
    gains: Gains,
    *,
    seed: int,
    device: torch.device,
) -> torch.Tensor:
    """One expert's rows [1, ...] of the module's parameter `name` (flat: [rows, columns]), in float32."""
    own = torch.Size((matrix.flat, *shape[1:]) if matrix.flat else shape[1:])
    one = f"{name}.{expert}"
    values = random_parameter(one, own, seed=seed, device=device, dtype=torch.float32, gains=gains)
    if matrix is site.down:
        values.mul_(EXPERT_GAIN)
    return values if matrix.flat else values[None]


def fill_random_whole(
    model: PreTrainedModel, *, seed: int, device: torch.device, dtype: torch.dtype, router_skew: float = 0.0
) -> None:
    """Give a whole transformers model, experts and all, the weights that whole_loading draws."""
    sites = find_experts(model)
    gains = gains_of_whole(sites, model.config, router_skew)
    matrices = {site.full_name(matrix): (site, matrix) for site in sites for matrix in site.matrices()}
    kept_wide = kept_in_float32(model, dtype)
    tied = model.all_tied_weights_keys
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in tied:
                continue
            if name in matrices:
                site, matrix = matrices[name]
                shape = tuple(tensor.shape)
                rows = matrix.flat or 1
                for expert in range(site.num_experts):
                    value = random_expert(name, site, matrix, shape, expert, gains, seed=seed, device=device)
                    tensor[expert * rows : (expert + 1) * rows].copy_(value)
            else:
                wide = not tensor.is_floating_point() or (kept_wide and kept_wide.search(name))
                own = tensor.dtype if wide or not isinstance(tensor, torch.nn.Parameter) else dtype
                made = random_parameter(name, tensor.shape, seed=seed, device=device, dtype=own, gains=gains)
                tensor.copy_(made)


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names of parameters that transformers keeps in float32 whatever the model's dtype."""
    names = set(model._keep_in_fp32_modules_strict or ()) if dtype != torch.float32 else set()
    names |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    return re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in sorted(names))) if names else None


def reference_model(
    path_or_config: str | Path | dict | PreTrainedConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    *,
    random_weights: bool = False,
    router_skew: float = 0.0,
) -> PreTrainedModel:
    """The plain transformers model, all experts on one device, with the weights that load_decoder gives the ranks."""
    from transformers import AutoModelForCausalLM

    device = torch.device(device)
    config, directory = read_config(path_or_config, random_weights=random_weights)
    if directory is not None:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
        return model.to(device).eval()
    if config.model_type not in MODULES:
        with device:
            whole = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        fill_random_whole(whole, seed=seed, device=device, dtype=dtype, router_skew=router_skew)
        return whole
    family = check_config(config)
    model = build_skeleton(config, attention="sdpa")
    moe_layers = family.moe_layers(config)
    every = range(family.num_experts(config))
    shape = dict(hidden=config.hidden_size, intermediate=family.intermediate(config))
    for index, layer in enumerate(moe_layers):
        weights = random_experts(index, every, **shape, seed=seed, device=device, dtype=dtype)
        module = model.model.layers[layer].mlp.experts
        module.gate_up_proj = torch.nn.Parameter(weights.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(weights.down, requires_grad=False)
    fill_random(model, seed=seed, device=device, dtype=dtype, router_skew=router_skew)
    return model
