"""The model families that pipemoe knows: one small module each, and one line here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from pipemoe.e4m3 import BLOCK
from pipemoe.errors import CheckpointError
from pipemoe.models.families.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODULES = {  # model_type in config.json -> module with FAMILY
    "qwen3_moe": "pipemoe.models.families.qwen3_moe",
    "mixtral": "pipemoe.models.families.mixtral",
    "deepseek_v3": "pipemoe.models.families.deepseek_v3",
}

# These rescale by the longest sequence seen, so that one sequence's result would depend on its neighbours.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")


def find_family(model_type: str | None, where: str = "") -> Family:
    """The family of a config.json's model_type; CheckpointError (its message begins with `where`) for an unknown one."""
    if model_type not in MODULES:
        raise CheckpointError(
            f"{where}model_type is {model_type!r}; known are {', '.join(sorted(MODULES))}. "
            "A new family is one module in pipemoe/models/families and one line in MODULES"
        )
    return import_module(MODULES[model_type]).FAMILY


def check_config(config: PreTrainedConfig, where: str = "") -> Family:
    """The family of `config`, once everything in it is known to be supported; CheckpointError otherwise."""
    family = find_family(config.model_type, where)
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        known = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        method, block = known.get("quant_method"), known.get("weight_block_size")
        if method != "fp8" or list(block or ()) != [BLOCK, BLOCK]:
            raise CheckpointError(
                f"{where}the checkpoint is quantised (quantization_config: quant_method {method!r}, weight_block_size {block}); pipemoe "
                f"reads unquantised weights and fp8 ones in blocks of {BLOCK} x {BLOCK}, convert it to bfloat16 first"
            )
    if config.hidden_act not in ("silu", "swish"):
        raise CheckpointError(f"{where}hidden_act is {config.hidden_act!r}; the experts are SwiGLU, 'silu' is wanted")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in _BATCH_DEPENDENT_ROPE:
        raise CheckpointError(f"{where}rope_type is {rope_type!r}, which depends on batch neighbours; it is not supported")
    if not family.moe_layers(config):
        raise CheckpointError(f"{where}none of the {config.num_hidden_layers} decoder layers has routed experts")
    return family
