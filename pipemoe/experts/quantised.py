"""Expert weights to e4m3 and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipemoe.e4m3 import dequantise_weight, num_blocks, quantise_weight
from pipemoe.errors import InputError

if TYPE_CHECKING:
    import torch

    from pipemoe.experts.weights import ExpertWeights


def quantise_experts(weights: ExpertWeights) -> ExpertWeights:
    """The same experts in float8_e4m3fn. Takes memory for one expert in float32. Raises InputError for biases."""
    import torch

    from pipemoe.experts.weights import ExpertWeights

    if weights.gate_up_bias is not None or weights.down_bias is not None:
        raise InputError("experts with biases cannot be float8_e4m3fn; leave them in bfloat16")
    if not weights.gated or weights.activation != "silu":
        raise InputError(
            f"{weights.activation} experts, gated: {weights.gated}, cannot be float8_e4m3fn; only gated ones with silu"
        )

    def quantised(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts, rows, columns = matrices.shape
        values = torch.empty(matrices.shape, dtype=torch.float8_e4m3fn, device=matrices.device)
        scales = torch.empty(
            (experts, num_blocks(rows), num_blocks(columns)), dtype=torch.float32, device=matrices.device
        )
        for expert in range(experts):
            values[expert], scales[expert] = quantise_weight(matrices[expert])
        return values, scales

    gate_up, gate_up_scales = quantised(weights.gate_up.detach())
    down, down_scales = quantised(weights.down.detach())
    return ExpertWeights(
        gate_up, down, first_expert=weights.first_expert, gate_up_scales=gate_up_scales, down_scales=down_scales
    )


def dequantise_experts(weights: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """Quantised experts as unquantised ones of `dtype`."""
    import torch

    from pipemoe.experts.weights import ExpertWeights

    def widened(matrices: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        wide = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
        for expert in range(len(matrices)):
            wide[expert] = dequantise_weight(matrices[expert], scales[expert], dtype)
        return wide

    return ExpertWeights(
        widened(weights.gate_up, weights.gate_up_scales),
        widened(weights.down, weights.down_scales),
        first_expert=weights.first_expert,
    )
