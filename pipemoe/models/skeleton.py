"""A transformers model without memory, and how its tensors are put in place later."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def build_skeleton(config: PreTrainedConfig, *, attention: str) -> PreTrainedModel:
    """The transformers model on the meta device: no memory, no initialisation; only the rotary tables are real."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    # The constructor computes its frequencies, so it is made again off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval().requires_grad_(False)


def materialise(
    model: PreTrainedModel,
    value: Callable[[str, torch.Size, torch.dtype], torch.Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put value(name, shape, dtype) in the place of every parameter and buffer that is still on the meta device."""
    for name, meta in list(model.state_dict().items()):
        if not meta.is_meta or name == tied_name(model):
            continue
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        if attribute in module._parameters:
            module._parameters[attribute] = torch.nn.Parameter(value(name, meta.shape, dtype), requires_grad=False)
        else:  # buffers here are the routers' biases, which stay in float32 as in transformers
            module._buffers[attribute] = value(name, meta.shape, torch.float32)
    if tied_name(model):
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb.to(device)


def tied_name(model: PreTrainedModel) -> str | None:
    """The output projection's name if the config ties it to the embedding."""
    return "lm_head.weight" if model.config.tie_word_embeddings else None


def fuse_norms(model: PreTrainedModel) -> None:
    """Replace the RMS norms by torch's: one kernel instead of eight, with the same weights, not copies.

    torch rounds once, at the end; transformers rounds before the weight too. In bfloat16 the results differ by that.
    """
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm") and not isinstance(norm, torch.nn.RMSNorm):
                fused = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, device="meta")
                fused.weight = norm.weight
                setattr(parent, name, fused.eval())
