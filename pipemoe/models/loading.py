"""Load a decoder: attention and all that is shared on every rank, and of the routed experts only this rank's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.arguments import shown
from pipemoe.e4m3 import num_blocks
from pipemoe.errors import CheckpointError, ConfigError, InputError
from pipemoe.experts.quantised import quantise_experts
from pipemoe.experts.weights import ExpertWeights, all_finite, check_finite, local_range
from pipemoe.models.attention import PACKED, register_packed_attention
from pipemoe.models.checkpoint import Checkpoint
from pipemoe.models.config import facts_of, read_config
from pipemoe.models.decoder import Decoder
from pipemoe.models.families import MODULES, Family, check_config
from pipemoe.models.families.whole import is_whole
from pipemoe.models.placeless import check_placeless
from pipemoe.models.progress import Progress
from pipemoe.models.random_parameters import expert_shares, fill_random, random_experts
from pipemoe.models.skeleton import build_skeleton, fuse_norms, materialise, tied_name
from pipemoe.models.whole_decoder import WholeDecoder
from pipemoe.models.whole_loading import PreparedWhole

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_decoder(
    path_or_config: str | Path | dict | PreTrainedConfig,
    *,
    rank: int,
    num_ranks: int,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    quantised: bool = False,
    random_weights: bool = False,
    router_skew: float = 0.0,
) -> tuple[Decoder | WholeDecoder, list[ExpertWeights]]:
    """Build the decoder and this rank's expert weights, one ExpertWeights per MoE layer.

    Arguments and errors: see PreparedDecoder.
    """
    prepared = prepare_decoder(
        path_or_config,
        rank=rank,
        num_ranks=num_ranks,
        device=device,
        dtype=dtype,
        seed=seed,
        quantised=quantised,
        random_weights=random_weights,
        router_skew=router_skew,
    )
    return prepared.load()


def prepare_decoder(
    path_or_config: str | Path | dict | PreTrainedConfig,
    *,
    rank: int,
    num_ranks: int,
    device: torch.device | str,
    dtype: torch.dtype,
    random_weights: bool = False,
    **options: Any,
) -> PreparedDecoder | PreparedWhole:
    """By the way that serves the model's family best. Arguments and errors: see PreparedDecoder."""
    where = f"rank {rank}: "
    place: dict[str, Any] = {"rank": rank, "num_ranks": num_ranks, "device": device, "dtype": dtype}
    config, directory = read_config(path_or_config, where, random_weights=random_weights)
    if config.model_type in MODULES or not is_whole(config.model_type):
        return PreparedDecoder(path_or_config, **place, random_weights=random_weights, **options)
    return PreparedWhole(config, directory, **place | {"device": _indexed(torch.device(device))}, **options)


class PreparedDecoder:
    """A model that is to be loaded, checked as far as possible before any weight is read."""

    def __init__(
        self,
        path_or_config: str | Path | dict | PreTrainedConfig,
        *,
        rank: int,
        num_ranks: int,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
        quantised: bool = False,
        random_weights: bool = False,
        router_skew: float = 0.0,
    ) -> None:
        """
        path_or_config: a checkpoint directory (config.json and safetensors), or, for random weights made from `seed`, a
        transformers config; with random_weights also a dict like config.json, the path of a .json file or of a
        directory with one. The other ranks' experts are never allocated and never read. quantised: experts in e4m3 (see
        pipemoe.e4m3), all else in `dtype`. router_skew: of random weights, see random_parameters.expert_shares. Raises
        CheckpointError that names rank, file and tensor: here for anything wrong in headers, in `load` for NaN weights.
        """
        self._where = f"rank {rank}: "
        self.device = _indexed(torch.device(device))
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"{self._where}dtype is {dtype}; it must be torch.float32, torch.bfloat16 or torch.float16"
            )
        self._dtype, self._seed, self._quantised, self._router_skew = dtype, seed, quantised, router_skew
        self._config, directory = read_config(path_or_config, self._where, random_weights=random_weights)
        self._family = check_config(self._config, self._where)
        self._moe_layers = self._family.moe_layers(self._config)
        self._experts = local_range(self._family.num_experts(self._config), num_ranks, rank)
        register_packed_attention()
        self._checkpoint = None if directory is None else Checkpoint(directory, self._where)
        if self._checkpoint is None:
            expert_shares(self._family.routing(self._config), router_skew, self._where)
        elif router_skew:
            raise ConfigError(f"{self._where}router_skew is {shown(router_skew)}, but is of random weights alone")
        if self._checkpoint is not None and self._config.tie_word_embeddings:
            with self._checkpoint as checkpoint:  # a stored head that differs wins
                self._config.tie_word_embeddings = not _has_own_head(checkpoint, self._family, dtype)
        self._model = build_skeleton(self._config, attention=PACKED)
        for layer in self._moe_layers:
            del self._model.model.layers[layer].mlp.experts
        if self._checkpoint is not None:
            self._check_headers(self._checkpoint)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights of this rank, and of the largest one once more."""
        hidden, width = self._config.hidden_size, self._family.intermediate(self._config)
        of_expert = 3 * hidden * width * self._dtype.itemsize
        if self._quantised:
            of_expert = 3 * hidden * width + 4 * (
                num_blocks(2 * width) * num_blocks(hidden) + num_blocks(hidden) * num_blocks(width)
            )
        of_experts = len(self._moe_layers) * len(self._experts) * of_expert
        return sum(self._shared_values()) * self._dtype.itemsize + of_experts + self.largest_bytes

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest tensor while it is converted, or drawn, in float32."""
        hidden, width = self._config.hidden_size, self._family.intermediate(self._config)
        return max([*self._shared_values(), 2 * hidden * width]) * torch.float32.itemsize

    def _shared_values(self) -> list[int]:
        """Values of each tensor that every rank holds."""
        return [meta.numel() for name, meta in self._model.state_dict().items() if name != tied_name(self._model)]

    def load(self) -> tuple[Decoder, list[ExpertWeights]]:
        """Put the weights in place."""
        config, family, experts, model = self._config, self._family, self._experts, self._model
        place: dict[str, Any] = {"device": self.device, "dtype": self._dtype}
        if self._checkpoint is None:
            fill_random(model, seed=self._seed, router_skew=self._router_skew, **place)
            shape: dict[str, Any] = {"hidden": config.hidden_size, "intermediate": family.intermediate(config)}
            weights = [
                random_experts(layer, experts, **shape, seed=self._seed, **place)
                for layer in range(len(self._moe_layers))
            ]
            if self._quantised:
                weights = [quantise_experts(layer_weights) for layer_weights in weights]
            identity = f"random weights, seed {self._seed}, router skew {self._router_skew:g}"
        else:
            with self._checkpoint as checkpoint, Progress(self._where, self.num_bytes) as checkpoint.progress:
                _fill_from(checkpoint, model, family, **place)
                weights = checkpoint.read_experts(family, config, experts, **place, quantised=self._quantised)
                identity = checkpoint.digest()
            _check_finite(model, weights, self._where)
        if self.device.type == "cuda" and family.plain_rms_norm:
            fuse_norms(model)
        return Decoder(model, family, **place, facts=facts_of(config, identity, self._dtype)), weights

    def _check_headers(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError for what is missing, of a wrong shape or dtype, or would be left out."""
        checkpoint.check_experts(self._family, self._config, self._experts)
        shapes = {
            name: tuple(meta.shape) for name, meta in self._model.state_dict().items() if name != tied_name(self._model)
        }
        for name, shape in shapes.items():
            checkpoint.locate(self._family.checkpoint_names(name), shape)
        check_placeless(checkpoint, self._family, self._config, [*shapes, HEAD], self._where)


def _has_own_head(checkpoint: Checkpoint, family: Family, dtype: torch.dtype) -> bool:
    """Is an output projection stored that is not the embedding again?"""
    head, embedding = (
        next((n for n in family.checkpoint_names(name) if n in checkpoint.tensors), None) for name in (HEAD, EMBEDDING)
    )
    if head is None or embedding is None:
        return head is not None
    shape = checkpoint.tensors[head].shape
    if checkpoint.tensors[embedding].shape != shape:
        return True  # what is wrong with them is named later
    return not torch.equal(checkpoint.read([head], shape).to(dtype), checkpoint.read([embedding], shape).to(dtype))


def _fill_from(
    checkpoint: Checkpoint, model: PreTrainedModel, family: Family, *, device: torch.device, dtype: torch.dtype
) -> None:
    def value(name: str, shape: torch.Size, wanted: torch.dtype) -> torch.Tensor:
        return checkpoint.read(family.checkpoint_names(name), tuple(shape)).to(device, wanted)

    materialise(model, value, device=device, dtype=dtype)


def _check_finite(model: PreTrainedModel, weights: list[ExpertWeights], where: str) -> None:
    """A NaN in any weight would spread over the ranks' sums and show far from its cause."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:  # routers' biases are buffers
        if not all_finite(parameter):
            raise CheckpointError(
                f"{where}{name} holds NaN or infinite values; every weight must be finite, check the checkpoint"
            )
    try:
        check_finite(weights)
    except InputError as error:
        raise CheckpointError(f"{where}{error}") from None


def _indexed(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
