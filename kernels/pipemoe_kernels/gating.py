"""What stands between an expert's two GEMMs: activation(gate) * (up + up_offset), or without a gate activation(up).

Pure Python: weights on a host name their gating by it too.
"""

from __future__ import annotations

from typing import NamedTuple

# gelu is the exact one, gelu_tanh its approximation by tanh; relu2 is relu squared.
ACTIVATIONS = ("silu", "gelu", "relu", "gelu_tanh", "relu2")


class Gating(NamedTuple):
    """limit: gate is at most this, and up within plus and minus it (GPT-OSS, DeepSeek-V4). alpha: silu is
    x * sigmoid(alpha x).
    """

    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.0
    up_offset: float = 0.0

    @classmethod
    def of(cls, activation: str | Gating) -> Gating:
        """Kernels take a gating, or the mere name of an activation."""
        return cls(activation) if isinstance(activation, str) else activation
