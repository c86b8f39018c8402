"""Loads a decoder of any family that transformers has (whole_decoder.py): everything but the routed experts on every
rank, of those only this rank's.
"""

from __future__ import annotations

import logging
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.errors import CheckpointError, InputError
from pipemoe.experts.quantised import quantise_experts
from pipemoe.experts.weights import ExpertWeights, all_finite, check_finite, local_range
from pipemoe.models.checkpoint import Checkpoint
from pipemoe.models.config import facts_of
from pipemoe.models.experts_form import ExpertsSite, Matrix
from pipemoe.models.find_experts import find_experts
from pipemoe.models.progress import Progress
from pipemoe.models.random_parameters import expert_shares, random_parameter
from pipemoe.models.random_weights import gains_of_whole, kept_in_float32, random_expert
from pipemoe.models.stored_names import StoredNames
from pipemoe.models.whole_decoder import WholeDecoder

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

_log = logging.getLogger("pipemoe")
_COMPUTED = re.compile(r"(^|\.)(rotary_emb|rotary_pos_emb)\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SHOWN = 3
_BY_LENGTH = ("dynamic", "longrope", "su")


class PreparedWhole:
    """A model that is to be loaded, checked as far as possible before any weight is read; like PreparedDecoder."""

    def __init__(
        self,
        config: PreTrainedConfig,
        directory: Path | None,
        *,
        rank: int,
        num_ranks: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
        quantised: bool = False,
        router_skew: float = 0.0,
    ) -> None:
        """directory: None for random weights."""
        self._where = f"rank {rank}: "
        self._device, self._dtype, self._seed, self._quantised = device, dtype, seed, quantised
        self._skew = router_skew
        self._checkpoint = None if directory is None else Checkpoint(directory, self._where)
        if self._checkpoint is not None and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = not _has_own_head(config, self._checkpoint, dtype)
        self._config = config
        self._model = whole_skeleton(config, self._where)
        self._sites = find_sites(self._model, self._where)
        self._experts = local_range(self._sites[0].num_experts, num_ranks, rank)
        self._gains = gains_of_whole(self._sites, config, router_skew)
        expert_shares(self._gains.routing, router_skew, self._where)
        # Of the model's own tensors: their shapes, before the experts' are dropped.
        self._shapes = {name: tuple(t.shape) for name, t in self._model.state_dict().items()}
        self._of_experts = {site.full_name(matrix) for site in self._sites for matrix in site.matrices()}
        for site in self._sites:
            site.drop_weights()
        self._names = None
        if self._checkpoint is not None:
            self._names = StoredNames(self._model, self._checkpoint)
            self._check_headers(self._names, self._checkpoint)

    def _own_names(self) -> list[str]:
        """Tensors that every rank holds, without those that are another one again."""
        tied = self._model.all_tied_weights_keys
        return [name for name in self._shapes if name not in self._of_experts and name not in tied]

    def _check_headers(self, names: StoredNames, checkpoint: Checkpoint) -> None:
        for name in self._own_names():
            names.check(name, self._shapes[name])
        for site in self._sites:
            for matrix in site.matrices():
                names.check(site.full_name(matrix), self._shapes[site.full_name(matrix)], site.num_experts)
        ignored = [re.compile(p) for p in getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        num_layers, left, beyond = self._config.num_hidden_layers, [], set()
        tied = self._model.all_tied_weights_keys
        for stored in names.placeless([*self._shapes, *tied]):
            layer = _LAYER.search(stored)
            if layer and int(layer[1]) >= num_layers:
                beyond.add(int(layer[1]))
            elif not _COMPUTED.search(stored) and not any(p.search(stored) for p in ignored):
                left.append(f"{stored} (in {checkpoint.tensors[stored].file.name})")
        if left:
            more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
            raise CheckpointError(
                f"{self._where}{checkpoint.directory}: a {self._config.model_type} model of this config has no place "
                f"for the stored tensor{'s' * (len(left) > 1)} {', '.join(sorted(left)[:_SHOWN])}{more}; without what "
                "is stored it would compute something else. Check that config.json belongs to the shards"
            )
        if beyond:
            _log.info("%snum_hidden_layers is %d; the stored layers %s are not read", self._where, num_layers, beyond)

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights of this rank, and of the largest one once more."""
        shared = sum(self._numel(name) for name in self._own_names())
        of_experts = sum(self._numel(name) for name in self._of_experts) * len(self._experts)
        width = 1 if self._quantised else self._dtype.itemsize
        return shared * self._dtype.itemsize + of_experts * width // self._sites[0].num_experts + self.largest_bytes

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest tensor while it is converted, or drawn, in float32."""
        own = max(self._numel(name) for name in self._own_names())
        of_layer = max(self._numel(name) for name in self._of_experts) * len(self._experts)
        return 4 * max(own, of_layer // self._sites[0].num_experts)

    def _numel(self, name: str) -> int:
        count = 1
        for size in self._shapes[name]:
            count *= size
        return count

    def load(self) -> tuple[WholeDecoder, list[ExpertWeights]]:
        """Put the weights in place."""
        if self._checkpoint is None:
            weights, identity = self._filled(), f"random weights, seed {self._seed}, router skew {self._skew:g}"
        else:
            with self._checkpoint as checkpoint, Progress(self._where, self.num_bytes) as checkpoint.progress:
                weights, identity = self._filled(), checkpoint.digest()
        self._check_finite(weights)
        decoder = WholeDecoder(
            self._model,
            self._sites,
            device=self._device,
            dtype=self._dtype,
            facts=facts_of(self._config, identity, self._dtype),
            equal_lengths=_depends_on_batch(self._config),
        )
        return decoder, weights

    def _filled(self) -> list[ExpertWeights]:
        """All weights in their places; returns the experts'."""
        self._fill()
        made = [site.make(partial(self._matrix, site), self._experts.start) for site in self._sites]
        return [quantise_experts(weights) for weights in made] if self._quantised else made

    def _matrix(self, site: ExpertsSite, matrix: Matrix) -> torch.Tensor:
        """This rank's experts of one kind of matrix, as Matrix.of_experts has them."""
        name, own = site.full_name(matrix), range(len(self._experts))
        shape = self._shapes[name]
        if self._names is None:
            stored, is_plain = self._random_experts(name, site, matrix, shape), False
        elif matrix.flat:
            rows = range(self._experts.start * matrix.flat, self._experts.stop * matrix.flat)
            stored, is_plain = self._names.read_experts(name, shape, rows)
        else:
            stored, is_plain = self._names.read_experts(name, shape, self._experts)
        stored = stored.to(self._device, self._dtype)
        return (matrix.of_plain if is_plain else matrix.of_experts)(stored, own)

    def _random_experts(self, name: str, site: ExpertsSite, matrix: Matrix, shape: tuple[int, ...]) -> torch.Tensor:
        experts = [
            random_expert(name, site, matrix, shape, expert, self._gains, seed=self._seed, device=self._device)
            for expert in self._experts
        ]
        rows = (matrix.flat,) if matrix.flat else ()
        return torch.cat(experts) if experts else torch.empty(0, *rows, *shape[1:]).flatten(0, len(rows))

    def _fill(self) -> None:
        """Every tensor that is not of a routed expert; then what transformers computes for itself, such as rotary
        frequencies.
        """
        model, tied = self._model, self._model.all_tied_weights_keys
        kept_wide = kept_in_float32(model, self._dtype)
        with torch.no_grad():
            for name in self._own_names():
                module, attribute = _place(model, name)
                old = getattr(module, attribute)
                is_parameter = attribute in module._parameters
                narrow = old.is_floating_point() and is_parameter and not (kept_wide and kept_wide.search(name))
                dtype = self._dtype if narrow else old.dtype
                if self._names is None:
                    value = random_parameter(
                        name, old.shape, seed=self._seed, device=self._device, dtype=dtype, gains=self._gains
                    )
                else:
                    value = self._names.read(name, self._shapes[name]).to(self._device, dtype)
                _put(module, attribute, value, is_parameter)
            for site in self._sites:
                for matrix in site.matrices():
                    module, attribute = _place(model, site.full_name(matrix))
                    empty = torch.empty(0, dtype=self._dtype, device=self._device)
                    _put(module, attribute, empty, True)
            for name, buffer in list(model.named_non_persistent_buffers()):
                module, attribute = _place(model, name)
                module._buffers[attribute] = torch.empty_like(buffer, device=self._device)
        for module in model.modules():
            module._is_hf_initialized = False  # what is in place says so itself
        model.initialize_weights()
        if tied:
            model.tie_weights(recompute_mapping=False)
        model.eval().requires_grad_(False)

    def _check_finite(self, weights: list[ExpertWeights]) -> None:
        for name, parameter in self._model.named_parameters():
            if parameter.is_floating_point() and not all_finite(parameter):
                raise CheckpointError(
                    f"{self._where}{name} holds NaN or infinite values; every weight must be finite, check the "
                    "checkpoint"
                )
        try:
            check_finite(weights)
        except InputError as error:
            raise CheckpointError(f"{self._where}{error}") from None


def whole_skeleton(config: PreTrainedConfig, where: str = "") -> PreTrainedModel:
    """The transformers model on the meta device. Raises CheckpointError if transformers cannot make it."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any kind, at an odd config
        raise CheckpointError(
            f"{where}transformers makes no {config.model_type} model of this config: {error}"
        ) from error
    return model.eval().requires_grad_(False)


def find_sites(model: PreTrainedModel, where: str = "") -> list[ExpertsSite]:
    """find_experts, with CheckpointError."""
    try:
        return find_experts(model)
    except InputError as error:
        raise CheckpointError(f"{where}{error}") from None


def _place(model: torch.nn.Module, name: str) -> tuple[Any, str]:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def _put(module: Any, attribute: str, value: torch.Tensor, is_parameter: bool) -> None:
    if is_parameter:
        value = torch.nn.Parameter(value, requires_grad=False)
        module._parameters[attribute] = value
    else:
        module._buffers[attribute] = value
    value._is_hf_initialized = True  # type: ignore[attr-defined]


def _has_own_head(config: PreTrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    """Is an output projection stored that is not the embedding again?"""
    model = whole_skeleton(config, checkpoint.where)
    names = StoredNames(model, checkpoint)
    for target, source in model.all_tied_weights_keys.items():
        if not (names.is_stored(target) and names.is_stored(source)):
            if names.is_stored(target):
                return True
            continue
        shape = tuple(model.get_parameter(source).shape)
        if not torch.equal(names.read(target, shape).to(dtype), names.read(source, shape).to(dtype)):
            return True
    return False


def _depends_on_batch(config: PreTrainedConfig) -> bool:
    """Would padding change what a sequence gets? Some rotary embeddings depend on the longest sequence, and some sparse
    attention on the number of keys.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    by_length = any(kind.get("rope_type") in _BY_LENGTH for kind in kinds)
    return by_length or getattr(config, "index_topk", None) is not None
