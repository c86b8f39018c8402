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


def facts_of(config: PreTrainedConfig, identity: str, dtype: torch.dtype) -> dict[str, str]:
    """What must be equal on all ranks, by the names that an error is to use: config, checkpoint (or seed) and dtype."""
    described = {k: v for k, v in config.to_dict().items() if k not in _PROVENANCE}
    facts = {f"the model's {key}": json.dumps(described[key], sort_keys=True, default=str) for key in sorted(described)}
    return facts | {"the model's dtype": str(dtype), "the model's checkpoint": identity}


def fingerprint_of(facts: dict[str, str]) -> str:
    """A hex digest that is equal on two ranks only if `facts` are."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def num_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a sequence may have; None if the config does not say.

    Configs with scaled rotary embeddings may give max_position_embeddings as it was before scaling (Qwen3's yarn) or after (DeepSeek-V3's);
    the larger holds.
    """
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if most is None or rope.get("rope_type", "default") in ("default", "llama3", "longrope"):  # the last two give it after scaling
        return most
    return max(most, int((rope.get("original_max_position_embeddings") or most) * (rope.get("factor") or 1)))
