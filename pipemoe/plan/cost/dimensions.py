"""A model's dimensions, as far as they decide what its operations cost."""

from __future__ import annotations

from dataclasses import dataclass

from pipemoe.plan.schedule import ModelShape


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Per MoE layer, unless said otherwise; weights in numbers of values, whatever their type."""

    shape: ModelShape
    dense_weights: int  # attention, router and shared experts: multiplied with every token of the own rank
    pair_flops: int  # of attention, per pair of a query and a key it may see, all heads
    num_dense_layers: int = 0  # before the first MoE layer
    dense_layer_weights: int = 0  # of one of them

    @property
    def expert_weights(self) -> int:
        """Values in one expert's gate, up and down projections."""
        return 3 * self.shape.hidden * self.shape.intermediate


def dimensions_of_shape(shape: ModelShape) -> Dimensions:
    """For a caller's own attention, which is unknown: four projections H x H, all heads together as wide as H."""
    return Dimensions(shape, 4 * shape.hidden**2 + shape.hidden * shape.num_experts, 4 * shape.hidden)
