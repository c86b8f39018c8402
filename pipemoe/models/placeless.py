"""Stored tensors that the model has no place for are refused by name: without them it would compute something else.

Two kinds are left out by rule, and `logging` says so: buffers that are computed anew (rotary frequencies), and decoder
layers beyond num_hidden_layers (DeepSeek-V3's layers for multi-token prediction; a config cut to its first layers).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipemoe.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from pipemoe.models.checkpoint import Checkpoint
    from pipemoe.models.families import Family

_log = logging.getLogger("pipemoe")
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_SHOWN = 3


def check_placeless(
    checkpoint: Checkpoint, family: Family, config: PreTrainedConfig, names: Iterable[str], where: str
) -> None:
    """names: of the model's own parameters, without routed experts. Raises CheckpointError."""
    taken = set(_experts_names(checkpoint, family, config, where))
    for name in names:
        stored = [n for n in family.checkpoint_names(name) if n in checkpoint.tensors]
        _check_once(checkpoint, stored, where)
        taken.update(stored)
    taken |= {name for name in map(checkpoint.scales_of, taken) if name}
    left, beyond = [], set()
    for name in checkpoint.tensors:
        layer = _LAYER.match(name)
        if name in taken or _COMPUTED.search(name):
            continue
        if layer and int(layer[1]) >= config.num_hidden_layers:
            beyond.add(int(layer[1]))
        else:
            left.append(name)
    if left:
        shown = ", ".join(f"{name} (in {checkpoint.tensors[name].file.name})" for name in sorted(left)[:_SHOWN])
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        raise CheckpointError(
            f"{where}{checkpoint.directory}: a {family.model_type} model of this config has no place for the stored "
            f"tensor{'s' * (len(left) > 1)} {shown}{more}; without what is stored it would compute something else. "
            "Check that config.json belongs to the shards"
        )
    if beyond:
        promised = getattr(config, "num_nextn_predict_layers", None) or 0
        level = logging.INFO if len(beyond) <= promised else logging.WARNING
        layers = ", ".join(map(str, sorted(beyond)))
        _log.log(
            level,
            "%s%s: num_hidden_layers is %d; the stored layers %s are not read",
            where,
            checkpoint.directory,
            config.num_hidden_layers,
            layers,
        )


def _experts_names(checkpoint: Checkpoint, family: Family, config: PreTrainedConfig, where: str) -> Iterable[str]:
    """Stored names of the routed experts' weights, of all ranks."""
    for layer in family.moe_layers(config):
        fused = [name for name in family.fused_names(layer) if name in checkpoint.tensors]
        single = [
            n
            for e in range(family.num_experts(config))
            for n in family.expert_names(layer, e)
            if n in checkpoint.tensors
        ]
        if fused and single:
            _check_once(checkpoint, [fused[0], single[0]], where)
        yield from fused or single


def _check_once(checkpoint: Checkpoint, names: list[str], where: str) -> None:
    if len(names) > 1:
        raise CheckpointError(
            f"{where}{checkpoint.directory}: {' and '.join(names)} are both stored, but are the same weights of the "
            "model; leave one of them out"
        )
