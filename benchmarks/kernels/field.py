"""For each cell the best other implementation that could be found, in its best configuration: what to be ahead of.

Measured on one H200, 2026-11, bfloat16, one run each: milliseconds of the whole routed-expert computation, and the
floor by the ceilings of those runs (cuBLAS 663 to 708 TFLOP/s, copies 4.21 to 4.26 TB/s). Another card's run is
compared by its ratio to its own floor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldBest:
    floor_ms: float
    ms: float
    name: str

    @property
    def ratio_to_floor(self) -> float:
        return self.ms / self.floor_ms


# layer, tokens -> the best
FIELD: dict[tuple[str, int], FieldBest] = {
    ("deepseek-v3", 64): FieldBest(0.540, 0.539, "Triton"),
    ("deepseek-v3", 512): FieldBest(0.665, 0.676, "Triton"),
    ("deepseek-v3", 4096): FieldBest(0.665, 1.02, "DeepGEMM"),
    ("deepseek-v3", 16384): FieldBest(2.08, 2.88, "SonicMoE"),
    ("qwen3-30b-a3b", 64): FieldBest(0.036, 0.068, "Triton"),
    ("qwen3-30b-a3b", 512): FieldBest(0.036, 0.072, "Triton"),
    ("qwen3-30b-a3b", 4096): FieldBest(0.057, 0.135, "DeepGEMM"),
    ("qwen3-30b-a3b", 16384): FieldBest(0.224, 0.380, "DeepGEMM"),
    ("qwen3-30b-a3b-all", 64): FieldBest(0.276, 0.298, "Triton"),
    ("qwen3-30b-a3b-all", 512): FieldBest(0.285, 0.335, "Triton"),
    ("qwen3-30b-a3b-all", 4096): FieldBest(0.452, 0.781, "Triton"),
    ("qwen3-30b-a3b-all", 16384): FieldBest(1.81, 2.55, "SonicMoE"),
    ("mixtral-8x7b-1of8", 64): FieldBest(0.083, 0.118, "DeepGEMM"),
    ("mixtral-8x7b-1of8", 512): FieldBest(0.083, 0.128, "DeepGEMM"),
    ("mixtral-8x7b-1of8", 4096): FieldBest(0.520, 0.546, "DeepGEMM"),
    ("mixtral-8x7b-1of8", 16384): FieldBest(2.13, 2.24, "DeepGEMM"),
    ("mixtral-8x7b-all", 64): FieldBest(0.665, 0.659, "Triton"),
    ("mixtral-8x7b-all", 512): FieldBest(0.665, 0.973, "DeepGEMM"),
    ("mixtral-8x7b-all", 4096): FieldBest(4.22, 4.78, "cuBLAS loop"),
    ("mixtral-8x7b-all", 16384): FieldBest(16.9, 17.9, "DeepGEMM"),
}
