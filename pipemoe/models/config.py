"""A model's config: where it comes from, and what of it makes two models the same."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import CheckpointError
from pipemoe.models.families import find_family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Keys of a config that say where it came from, not what the model is.
_PROVENANCE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "name_or_path")


def read_config(source: str | Path | dict | PreTrainedConfig, where: str = "") -> tuple[PreTrainedConfig, Path | None]:
    """The config and, when `source` is a checkpoint directory, that directory."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    if isinstance(source, PreTrainedConfig):
        return copy.deepcopy(source), None  # building a model writes its attention's name into the config
    if isinstance(source, dict):
        raw, directory, name = copy.deepcopy(source), None, "the config given"
    else:
        path = Path(source)
        directory = None if path.suffix == ".json" else path
        file = path if directory is None else path / "config.json"
        name = str(file)
        try:
            raw = json.loads(file.read_text())
        except OSError as error:
            raise CheckpointError(
                f"{where}cannot read {file}: {error.strerror}; a checkpoint directory holds config.json and safetensors"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{where}{file} is not JSON: {error}; fetch it again") from error
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where}{file} holds a {type(raw).__name__}; an object is wanted")
    model_type = raw.pop("model_type", None)
    find_family(model_type, f"{where}{name}: ")
    try:
        return CONFIG_MAPPING[model_type].from_dict(raw), directory
    except Exception as error:  # transformers validates by many exception types
        raise CheckpointError(f"{where}{name} is not a valid {model_type} config: {error}") from error


def fingerprint_of(config: PreTrainedConfig, identity: str, dtype: torch.dtype) -> str:
    """A hex digest that is equal on two ranks only if config, checkpoint (or seed) and dtype are."""
    described = {k: v for k, v in config.to_dict().items() if k not in _PROVENANCE}
    text = json.dumps([described, identity, str(dtype)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
