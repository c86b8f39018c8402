"""A model's config: where it comes from, and what of it makes two models the same."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import CheckpointError, ConfigError
from pipemoe.model_facts.facts import positions_of, with_defaults_for_nulls
from pipemoe.models.families import MODULES, check_fields, find_family
from pipemoe.models.families.whole import ALIASES, is_whole, whole_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Keys of a config that say where it came from, not what the model is.
_PROVENANCE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "name_or_path")


_NO_WEIGHTS = "has no weights: give a checkpoint directory, or random_weights=True for random ones"


def read_config(
    source: str | Path | dict | PreTrainedConfig, where: str = "", *, random_weights: bool = False
) -> tuple[PreTrainedConfig, Path | None]:
    """The config, and the checkpoint directory that holds its weights: None for random ones.

    Those are made for a transformers config, and for anything else only if random_weights. Raises CheckpointError.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    if type(random_weights) is not bool:
        raise ConfigError(f"{where}random_weights is {random_weights!r}; it must be True or False")
    if isinstance(source, PreTrainedConfig):
        # building a model writes its attention's name into the config
        return _with_head_dim(copy.deepcopy(source)), None
    directory = None
    if isinstance(source, dict):
        raw, name = copy.deepcopy(source), "the config given"
        if not random_weights:
            raise CheckpointError(f"{where}a dict {_NO_WEIGHTS}")
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        is_file = path.is_file() or path.suffix == ".json"
        if is_file and not random_weights:
            raise CheckpointError(f"{where}{path} is a file, which {_NO_WEIGHTS}")
        directory = None if random_weights else path
        file = path if is_file else path / "config.json"
        raw, name = _read_json(file, where), str(file)
    else:
        wanted = "a checkpoint directory, a transformers config, or with random_weights=True a dict"
        raise CheckpointError(f"{where}a model cannot be loaded from a {type(source).__name__}; give {wanted}")
    model_type = raw.get("model_type")
    if isinstance(model_type, str) and model_type in ALIASES:
        raw["model_type"] = model_type = ALIASES[model_type]
    if model_type not in MODULES and is_whole(model_type):
        return whole_config(raw, f"{where}{name}: "), directory
    family = find_family(model_type, f"{where}{name}: ")
    model_type = family.model_type
    check_fields(raw, f"{where}{name}: ")
    raw = with_defaults_for_nulls(raw)
    del raw["model_type"]
    try:
        return _with_head_dim(CONFIG_MAPPING[model_type].from_dict(raw)), directory
    except Exception as error:  # transformers validates by many exception types
        raise CheckpointError(f"{where}{name} is not a valid {model_type} config: {error}") from error


def _with_head_dim(config: PreTrainedConfig) -> PreTrainedConfig:
    """A head_dim of None stands for the usual one, which transformers' scaled rotary embeddings do not know."""
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    return config


def _read_json(file: Path, where: str) -> dict:
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{where}cannot read {file}: {error.strerror}; a checkpoint directory holds config.json and safetensors"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}{file} is not JSON: {error}; fetch it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where}{file} holds a {type(raw).__name__}; an object is wanted")
    return raw


def facts_of(config: PreTrainedConfig, identity: str, dtype: torch.dtype) -> dict[str, str]:
    """What must be equal on all ranks, by the names that an error is to use: config, checkpoint (or seed) and dtype."""
    described = {k: v for k, v in config.to_dict().items() if k not in _PROVENANCE}
    facts = {f"the model's {key}": json.dumps(described[key], sort_keys=True, default=str) for key in sorted(described)}
    return facts | {"the model's dtype": str(dtype), "the model's checkpoint": identity}


def fingerprint_of(facts: dict[str, str]) -> str:
    """A hex digest that is equal on two ranks only if `facts` are."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def num_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a sequence may have, see positions_of; None if the config does not say."""
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return None if most is None else positions_of(most, rope)
