"""Load a decoder: attention and everything shared on every rank, of the routed experts this rank's only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import CheckpointError, ConfigError, InputError
from pipemoe.experts.quantised import quantise_experts
from pipemoe.experts.weights import ExpertWeights, check_finite, local_range
from pipemoe.models.attention import PACKED, register_packed_attention
from pipemoe.models.checkpoint import Checkpoint
from pipemoe.models.config import facts_of, read_config
from pipemoe.models.decoder import Decoder
from pipemoe.models.families import Family, check_config
from pipemoe.models.random_weights import fill_random, random_experts
from pipemoe.models.skeleton import build_skeleton, fuse_norms, materialise, tied_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def load_decoder(
    path_or_config: str | Path | dict | PreTrainedConfig,
    *,
    rank: int,
    num_ranks: int,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    quantised: bool = False,
) -> tuple[Decoder, list[ExpertWeights]]:
    """Build the decoder and this rank's expert weights, one ExpertWeights per MoE layer.

    path_or_config: a checkpoint directory (config.json and safetensors), or, for random weights made from `seed`, a
    transformers config, a dict like config.json, or the path of a .json file. The other ranks' experts are never
    allocated and never read. quantised: experts in e4m3 (see pipemoe.e4m3), all else in `dtype`. Raises CheckpointError that names rank, file and tensor, also for NaN weights.
    """
    where = f"rank {rank}: "
    device = _indexed(torch.device(device))
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"{where}dtype is {dtype}; it must be torch.float32, torch.bfloat16 or torch.float16")
    config, directory = read_config(path_or_config, where)
    family = check_config(config, where)
    experts = local_range(family.num_experts(config), num_ranks, rank)
    register_packed_attention()
    model = build_skeleton(config, attention=PACKED)
    for layer in family.moe_layers(config):
        del model.model.layers[layer].mlp.experts
    if directory is None:
        fill_random(model, seed=seed, device=device, dtype=dtype)
        shape = dict(hidden=config.hidden_size, intermediate=family.intermediate(config))
        weights = [
            random_experts(layer, experts, **shape, seed=seed, device=device, dtype=dtype)
            for layer in range(len(family.moe_layers(config)))
        ]
        if quantised:
            weights = [quantise_experts(layer_weights) for layer_weights in weights]
        identity = f"random weights, seed {seed}"
    else:
        with Checkpoint(directory, where) as checkpoint:
            checkpoint.check_experts(family, config, experts)
            _fill_from(checkpoint, model, family, device=device, dtype=dtype)
            weights = checkpoint.read_experts(family, config, experts, device=device, dtype=dtype, quantised=quantised)
            identity = checkpoint.digest()
        _check_finite(model, weights, where)
    if device.type == "cuda" and family.plain_rms_norm:
        fuse_norms(model)
    return Decoder(model, family, device=device, dtype=dtype, facts=facts_of(config, identity, dtype)), weights


def _fill_from(
    checkpoint: Checkpoint, model: PreTrainedModel, family: Family, *, device: torch.device, dtype: torch.dtype
) -> None:
    for name, meta in model.state_dict().items():  # find what is missing before any weight moves
        if name != tied_name(model):
            checkpoint.locate(family.checkpoint_names(name), tuple(meta.shape))

    def value(name: str, shape: torch.Size, wanted: torch.dtype) -> torch.Tensor:
        return checkpoint.read(family.checkpoint_names(name), tuple(shape)).to(device, wanted)

    materialise(model, value, device=device, dtype=dtype)


def _check_finite(model: PreTrainedModel, weights: list[ExpertWeights], where: str) -> None:
    """NaN in any weight would spread over the ranks' sums and show up far from its cause."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{where}{name} holds NaN or infinite values; every weight must be finite, check the checkpoint")
    try:
        check_finite(weights)
    except InputError as error:
        raise CheckpointError(f"{where}{error}") from None


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
