"""This rank's expert weights and the fused experts call, per device kind."""

from pipemoe.experts.factory import make_experts
from pipemoe.experts.protocol import Experts, Scratch
from pipemoe.experts.quantised import dequantise_experts, quantise_experts
from pipemoe.experts.weights import ExpertWeights, check_finite, local_range

__all__ = [
    "Experts",
    "ExpertWeights",
    "Scratch",
    "check_finite",
    "dequantise_experts",
    "local_range",
    "make_experts",
    "quantise_experts",
]
