"""The model families that pipemoe knows: one small module each, and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipemoe.errors import CheckpointError, ConfigError
from pipemoe.model_facts.facts import MODEL_TYPES
from pipemoe.model_facts.limits import check_common, supported_facts
from pipemoe.models.families.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODULES = {  # model_type in config.json -> module with FAMILY
    "qwen3_moe": "pipemoe.models.families.qwen3_moe",
    "mixtral": "pipemoe.models.families.mixtral",
    "deepseek_v3": "pipemoe.models.families.deepseek_v3",
}


def find_family(model_type: str | None, where: str = "") -> Family:
    """The family of a config.json's model_type. Raises CheckpointError, beginning with `where`, for an unknown one."""
    if not isinstance(model_type, str) or model_type not in MODULES:
        raise CheckpointError(
            f"{where}model_type is {model_type!r}; known are {', '.join(sorted(MODULES))}, and the causal LMs with "
            "routed experts that transformers ships. A new family is one module in pipemoe/models/families and one "
            "line in MODULES"
        )
    return import_module(MODULES[model_type]).FAMILY


def check_config(config: PreTrainedConfig, where: str = "") -> Family:
    """The family of `config`, once everything in it is known to be supported; CheckpointError otherwise."""
    family = find_family(config.model_type, where)
    check_fields(config.to_dict(), where)
    if not family.moe_layers(config):
        raise CheckpointError(f"{where}none of the {config.num_hidden_layers} decoder layers has routed experts")
    return family


def check_fields(config: Mapping[str, Any], where: str = "") -> None:
    """Raises CheckpointError, naming the field, if a config asks for what its family does not implement."""
    try:
        if config["model_type"] in MODEL_TYPES:
            supported_facts(config)
        else:
            check_common(config)
    except ConfigError as error:
        raise CheckpointError(f"{where}{error}") from None
