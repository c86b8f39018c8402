"""Expert weights to e4m3 and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipemoe.arguments import shown
from pipemoe.e4m3 import dequantise_weight, num_blocks, quantise_weight
from pipemoe.errors import InputError, describe

if TYPE_CHECKING:
    import torch

    from pipemoe.experts.weights import ExpertWeights


def quantise_experts(weights: ExpertWeights) -> ExpertWeights:
    """The same experts in float8_e4m3fn. Takes memory for one expert in float32.

    Raises InputError for what is no ExpertWeights or does not fit together, for quantised ones, and for biases.
    """
    import torch

    from pipemoe.experts.weights import ExpertWeights

    _look_at(weights, is_quantised=False)
    if weights.gate_up_bias is not None or weights.down_bias is not None:
        raise InputError("experts with biases cannot be float8_e4m3fn; leave them in bfloat16")
    if not weights.gated or weights.gating != "silu":
        raise InputError(
            f"{weights.gating} experts, gated: {weights.gated}, cannot be float8_e4m3fn; only gated ones with silu"
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
    """Quantised experts as unquantised ones of `dtype`, which is floating. Raises InputError for what is neither."""
    import torch

    from pipemoe.experts.weights import ExpertWeights

    _look_at(weights, is_quantised=True)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(f"dtype is {shown(dtype)}; it must be torch.float32, torch.bfloat16 or another wide float")
    assert weights.gate_up_scales is not None and weights.down_scales is not None  # they are quantised

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


def _look_at(weights: Any, *, is_quantised: bool) -> None:
    """Raises InputError unless these are ExpertWeights that fit together, quantised or not."""
    from pipemoe.experts.weights import ExpertWeights

    if not isinstance(weights, ExpertWeights):
        raise InputError(f"weights is a {type(weights).__name__}; it must be a pipemoe.experts.ExpertWeights")
    try:
        if is_quantised:
            _look_at_scales(weights)
        else:
            weights.validate(0)
        found, is_wide = weights.is_quantised, weights.dtype.is_floating_point
    except InputError as error:
        raise InputError(str(error).removeprefix("layer 0: ")) from None
    except Exception as error:  # fields may be anything
        raise InputError(f"the weights' fields cannot be looked at: {describe(error)}") from error
    if found != is_quantised or not is_wide:
        wanted = "float8_e4m3fn with scales" if is_quantised else "floating, and not quantised yet"
        raise InputError(f"the weights are {weights.dtype}; {wanted} is wanted")


def _look_at_scales(weights: ExpertWeights) -> None:
    """Raises InputError unless each matrix has its scales; of any size, also where no experts run on it."""
    import torch

    for name in ("gate_up", "down"):
        values, scales = getattr(weights, name), getattr(weights, f"{name}_scales")
        if values.dtype != torch.float8_e4m3fn or values.dim() != 3 or scales is None:
            raise InputError(
                f"{name} is {values.dtype} of {values.dim()} dimensions; float8_e4m3fn with scales is wanted"
            )
        experts, rows, columns = values.shape
        if tuple(scales.shape) != (experts, num_blocks(rows), num_blocks(columns)) or scales.dtype != torch.float32:
            raise InputError(
                f"{name}_scales is {scales.dtype} of shape {tuple(scales.shape)}; one float32 per block is wanted"
            )
