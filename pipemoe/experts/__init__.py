"""This rank's expert weights and the fused experts call, per device kind."""

from pipemoe.experts.factory import make_experts
from pipemoe.experts.protocol import Experts, Scratch, column_ranges
from pipemoe.experts.weights import ExpertWeights, check_finite, local_range

__all__ = ["Experts", "ExpertWeights", "Scratch", "check_finite", "column_ranges", "local_range", "make_experts"]
