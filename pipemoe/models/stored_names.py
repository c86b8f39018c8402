"""Which stored tensors make which of a model's own: by transformers' own table of old and new names.

    stored                                                       of the model
    model.layers.1.block_sparse_moe.experts.{0..7}.w1.weight |
    model.layers.1.block_sparse_moe.experts.{0..7}.w3.weight |-> model.layers.1.mlp.experts.gate_up_proj [8, 2I, H]
    model.layers.1.self_attn.q_proj.weight                   --> model.layers.1.self_attn.q_proj.weight

Of routed experts only those asked for are read, whether they are stored one by one or stacked.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pipemoe import mxfp4
from pipemoe.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipemoe.models.checkpoint import Checkpoint

_EXPERT = re.compile(r"experts\.(\d+)\.")
_MX_BLOCKS, _MX_SCALES = "_blocks", "_scales"
# Operations of transformers' converters that put experts side by side, and nothing else.
_STACKED = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FAMILIAR = 3  # names that an error shows


class _Source(NamedTuple):
    name: str  # stored
    pattern: str | None  # of the converter that takes it
    converter: Any


class StoredNames:
    """The table of one model and checkpoint. A model on the meta device will do."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        self._model, self._checkpoint = model, checkpoint
        conversions = get_model_conversion_mapping(model)
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        renamings = [c for c in conversions if not isinstance(c, WeightConverter)]
        of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        known = model.state_dict()
        self._integers = {name for name, tensor in known.items() if not tensor.is_floating_point()}
        self._sources: dict[str, list[_Source]] = {}
        for stored in sorted(checkpoint.tensors, key=dot_natural_key):
            if checkpoint.is_scales(stored) or self._is_mx(stored, _MX_SCALES):
                continue
            base = stored.removesuffix(_MX_BLOCKS) if self._is_mx(stored, _MX_BLOCKS) else stored
            name, pattern = rename_source_key(base, renamings, converters, model.base_model_prefix, known)
            if name not in known and base in known:  # a renaming that is meant for older names took this one too
                name, pattern = base, None
            source = _Source(stored, pattern, of_pattern.get(pattern) if pattern else None)
            self._sources.setdefault(name, []).append(source)

    def _is_mx(self, stored: str, suffix: str) -> bool:
        base = stored.removesuffix(suffix)
        tensors = self._checkpoint.tensors
        both = base != stored and base + _MX_BLOCKS in tensors and base + _MX_SCALES in tensors
        return both and tensors[base + _MX_BLOCKS].dtype == "U8"

    def placeless(self, names: Iterable[str]) -> list[str]:
        """Stored tensors that make none of the model's `names`."""
        taken = set(names)
        return [s.name for name, sources in self._sources.items() if name not in taken for s in sources]

    def is_stored(self, name: str) -> bool:
        return name in self._sources

    def check(self, name: str, shape: tuple[int, ...], num_experts: int | None = None) -> None:
        """Raise CheckpointError if what makes `name` is missing, or has another shape or dtype as far as that shows
        without reading. num_experts: how many are stacked in it, or stored by themselves.
        """
        sources = self._of(name)
        if num_experts is not None and sources[0].converter is not None:
            patterns: list[str] = list(sources[0].converter.source_patterns)
            for pattern in patterns:
                found = {self._expert_of(s) for s in sources if s.pattern == pattern}
                if missing := sorted(set(range(num_experts)) - found):
                    few = ", ".join(map(str, missing[:_FAMILIAR])) + (", ..." if len(missing) > _FAMILIAR else "")
                    raise self._error(
                        f"{name} is made of {pattern} of {num_experts} experts; those of {few} are missing"
                    )
        elif len(sources) > 1 and sources[0].converter is None:
            raise self._error(
                f"{' and '.join(s.name for s in sources)} are both stored, but are the same weights of the model; "
                "leave one of them out"
            )
        for source in sources:
            if source.name.endswith(_MX_BLOCKS):
                continue
            stored = self._checkpoint.tensors[source.name]
            wanted = stored.shape if source.converter is not None else shape
            self._checkpoint.locate([source.name], wanted, is_floating=name not in self._integers)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The model's tensor `name`, on the host, in its stored dtype (widened if quantised)."""
        sources = self._of(name)
        if sources[0].converter is None:
            return self._checkpoint.read([sources[0].name], shape, is_floating=name not in self._integers)
        return self._convert(name, sources, shape)

    def read_experts(self, name: str, shape: tuple[int, ...], experts: range) -> tuple[torch.Tensor, bool]:
        """Of a stacked tensor `name` [E, ...] the rows of `experts`, and whether its matrices are [out, in] whatever
        the module's are (MXFP4 is stored so).
        """
        sources = self._of(name)
        first = sources[0]
        if first.converter is not None:
            own = [s for s in sources if self._expert_of(s) in experts]
            if not own:
                return torch.empty(0, *shape[1:]), False
            return self._convert(name, own, (len(experts), *shape[1:])), False
        if first.name.endswith(_MX_BLOCKS):
            base = first.name.removesuffix(_MX_BLOCKS)
            blocks, scales = (self._checkpoint.read_raw(base + end, experts) for end in (_MX_BLOCKS, _MX_SCALES))
            return mxfp4.widen(blocks, scales, torch.bfloat16), True
        return self._checkpoint.read([first.name], shape, experts), False

    def _convert(self, name: str, sources: list[_Source], shape: tuple[int, ...]) -> torch.Tensor:
        converter = sources[0].converter
        if [type(operation).__name__ for operation in converter.operations] in _STACKED:
            return self._stack(name, sources, shape)
        tensors: dict[str, Any] = {}
        for source in sources:
            stored = self._checkpoint.read([source.name], self._checkpoint.tensors[source.name].shape)
            tensors.setdefault(source.pattern or "", []).append(stored)
        try:
            for operation in converter.operations:
                tensors = operation.convert(
                    tensors,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=name,
                    model=self._model,
                    config=self._model.config,
                )
        except Exception as error:  # shapes that do not fit together
            raise self._error(f"{name} cannot be made of {sources[0].name} and others: {error}") from error
        value = next(iter(tensors.values()))
        value = value[0] if isinstance(value, list) else value
        if tuple(value.shape) != shape:
            raise self._error(f"{name} is {tuple(value.shape)} as made of {sources[0].name} and others; wanted {shape}")
        return value

    def _stack(self, name: str, sources: list[_Source], shape: tuple[int, ...]) -> torch.Tensor:
        """Matrices of experts one by one, put where they belong in [E, rows of all patterns, columns]; copied once."""
        first = self._checkpoint.tensors[sources[0].name].dtype
        dtype = _DTYPES.get(first, torch.float32)
        out = torch.empty(shape, dtype=dtype)
        patterns, row = sources[0].converter.source_patterns, 0
        for pattern in patterns:
            own = [source for source in sources if source.pattern == pattern]
            rows = self._checkpoint.tensors[own[0].name].shape[0]
            for place, source in enumerate(own):  # in the order of the experts
                self._checkpoint.locate([source.name], (rows, shape[2]))
                out[place, row : row + rows].copy_(self._checkpoint.read([source.name], (rows, shape[2])))
            row += rows
        if row != shape[1]:
            raise self._error(f"{name} has {shape[1]} rows for each expert, but {patterns} give {row}")
        return out

    def _expert_of(self, source: _Source) -> int:
        found = _EXPERT.search(source.name)
        return int(found[1]) if found else -1

    def _of(self, name: str) -> list[_Source]:
        sources = self._sources.get(name)
        if sources is None:
            near = difflib.get_close_matches(name, self._sources, _FAMILIAR, 0.5)
            there = ", ".join(self._sources[n][0].name for n in near) or "nothing like it"
            raise self._error(
                f"tensor {name} is missing from all of its {self._checkpoint.num_shards} shards, by this name and by "
                f"those that transformers knows for it; there is {there}. Fetch the checkpoint again, or check that "
                "config.json belongs to it"
            )
        return sources

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._checkpoint.where}{self._checkpoint.directory}: {what}")
