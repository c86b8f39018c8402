"""What pipemoe must know about a model family that transformers' own modules do not tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pipemoe.models.attention_form import AttentionForm
from pipemoe.models.routing import RoutingSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Family:
    """Base of the families; a new one overrides what differs.

    Its transformers model must have `model.layers[i]` with input_layernorm, self_attn, post_attention_layernorm and an
    mlp that is dense, or has `gate` and SwiGLU `experts` (and perhaps `shared_experts`, added to the routed sum).
    """

    model_type: ClassVar[str]
    # Path in a checkpoint of one MoE block, and of the gate, up and down projections of one of its experts.
    block_name: ClassVar[str] = "model.layers.{layer}.mlp"
    expert_parts: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    # Whether every module of a class named ...RMSNorm is weight * x / rms(x), so that one fused kernel may replace its
    # eight.
    plain_rms_norm: ClassVar[bool] = False

    def num_experts(self, config: PreTrainedConfig) -> int:
        return config.num_experts

    def top_k(self, config: PreTrainedConfig) -> int:
        return config.num_experts_per_tok

    def intermediate(self, config: PreTrainedConfig) -> int:
        """Width I of one routed expert."""
        return config.moe_intermediate_size

    def moe_layers(self, config: PreTrainedConfig) -> list[int]:
        """Decoder layers that have routed experts, ascending."""
        return list(range(config.num_hidden_layers))

    def routing(self, config: PreTrainedConfig) -> RoutingSpec:
        raise NotImplementedError

    def attention(self, config: PreTrainedConfig) -> AttentionForm | None:
        """What the fused path must know; None leaves attention to transformers' modules."""
        return None

    def expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Checkpoint names of one expert's gate [I, H], up [I, H] and down [H, I] weights."""
        block = self.block_name.format(layer=layer)
        gate, up, down = (f"{block}.experts.{expert}.{part}.weight" for part in self.expert_parts)
        return gate, up, down

    def fused_names(self, layer: int) -> tuple[str, str]:
        """Names of the fused form that transformers holds in memory: gate_up [E, 2I, H] and down [E, H, I]."""
        return f"model.layers.{layer}.mlp.experts.gate_up_proj", f"model.layers.{layer}.mlp.experts.down_proj"

    def checkpoint_names(self, name: str) -> list[str]:
        """Names under which a checkpoint may hold the module parameter `name` (not of a routed expert), best first."""
        return [name]
