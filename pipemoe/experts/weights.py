"""Expert weights of one MoE layer that one rank holds.

rank:      0       1       2
experts: | 0 1 2 | 3 4 5 | 6 7 8 9 |        E = 10, R = 3: uneven counts are fine, zero too
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipemoe.arguments import shown, whole_number
from pipemoe.e4m3 import BLOCK
from pipemoe.errors import ConfigError, InputError
from pipemoe_kernels.gating import ACTIVATIONS, Gating

if TYPE_CHECKING:
    import torch


def local_range(num_experts: int, num_ranks: int, rank: int) -> range:
    """Global ids of the experts that `rank` of `num_ranks` holds: contiguous, counts differ by at most one."""
    where = f"rank {shown(rank)}: "
    num_experts = whole_number(f"{where}num_experts", num_experts, 0, ConfigError)
    num_ranks, rank = (
        whole_number(f"{where}num_ranks", num_ranks, 1, ConfigError),
        whole_number(f"{where}rank", rank, 0, ConfigError),
    )
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"{where}a rank must be in [0, {shown(num_ranks)}), the number of ranks")
    return range(num_experts * rank // num_ranks, num_experts * (rank + 1) // num_ranks)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights of the experts [first_expert, first_expert + E_loc) of one layer; E_loc may be 0.

    An expert is down(activation(gate x) * (up x + up_offset)); if not gated it is down(activation(up x)), and gate_up
    holds only up. Only `validate` raises InputError, so that a loader may fill it through views in any order.
    """

    gate_up: torch.Tensor  # [E_loc, 2I, H]; rows 0..I are the gate, I..2I the up projection; [E_loc, I, H] if not gated
    down: torch.Tensor  # [E_loc, H, I]
    gate_up_bias: torch.Tensor | None = None  # [E_loc, 2I or I]
    down_bias: torch.Tensor | None = None  # [E_loc, H]
    first_expert: int = 0
    activation: str = "silu"  # of pipemoe_kernels.gating.ACTIVATIONS; gelu is the exact one
    gated: bool = True
    gate_up_scales: torch.Tensor | None = None  # [E_loc, 2I/128, H/128] float32, if gate_up and down are float8_e4m3fn
    down_scales: torch.Tensor | None = None  # [E_loc, H/128, I/128]; see pipemoe.e4m3
    limit: float | None = None  # what gate is at most, and up within plus and minus
    alpha: float = 1.0  # silu is x * sigmoid(alpha x)
    up_offset: float = 0.0

    @property
    def num_local_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def hidden(self) -> int:
        return self.gate_up.shape[2]

    @property
    def intermediate(self) -> int:
        return self.down.shape[2]

    @property
    def gate_up_rows(self) -> int:
        """Rows of one expert's gate_up."""
        return 2 * self.intermediate if self.gated else self.intermediate

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers of one kind run the same kernels."""
        biases = self.gate_up_bias is None, self.down_bias is None
        return self.num_local_experts, self.intermediate, *biases, self.gating, self.gated

    @property
    def gating(self) -> str | Gating:
        """What stands between the two GEMMs, as kernels take it: the activation's name if nothing else is special."""
        gating = Gating(self.activation, self.limit, self.alpha, self.up_offset)
        return self.activation if gating == Gating(self.activation) else gating

    @property
    def dtype(self) -> torch.dtype:
        return self.gate_up.dtype

    @property
    def is_quantised(self) -> bool:
        return self.gate_up_scales is not None

    @property
    def row_dtype(self) -> torch.dtype:
        """Of the rows that these experts serve: their own dtype, or bfloat16 if they are quantised."""
        import torch

        return torch.bfloat16 if self.is_quantised else self.dtype

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors that are present, with their names."""
        names = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scales", "down_scales")
        named = [(name, getattr(self, name)) for name in names]
        return [(name, tensor) for name, tensor in named if tensor is not None]

    def validate(self, layer: int) -> None:
        """Raise InputError, naming the layer and the tensor, unless shapes, dtypes and devices agree."""
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"layer {layer}: activation is {self.activation!r}; one of {', '.join(ACTIVATIONS)} is wanted"
            )
        self._validate_gating(layer)
        if whole_number(f"layer {layer}: first_expert", self.first_expert, 0) >= 1 << 31:
            raise InputError(f"layer {layer}: first_expert is {shown(self.first_expert)}; it must be below 2**31")
        if self.gate_up.dim() != 3 or self.down.dim() != 3:
            raise InputError(
                f"layer {layer}: gate_up and down have {self.gate_up.dim()} and {self.down.dim()} dimensions; "
                f"3 each are wanted: [E_loc, {'2I' if self.gated else 'I'}, H] and [E_loc, H, I]"
            )
        experts, hidden, intermediate = self.num_local_experts, self.hidden, self.intermediate
        wanted = {
            "gate_up": (experts, self.gate_up_rows, hidden),
            "down": (experts, hidden, intermediate),
            "gate_up_bias": (experts, self.gate_up_rows),
            "down_bias": (experts, hidden),
            "gate_up_scales": (experts, 2 * intermediate // BLOCK, hidden // BLOCK),
            "down_scales": (experts, hidden // BLOCK, intermediate // BLOCK),
        }
        self._validate_format(layer)
        for name, tensor in self.tensors():
            if tuple(tensor.shape) != wanted[name]:
                raise InputError(f"layer {layer}: {name} has shape {tuple(tensor.shape)}; {wanted[name]} is wanted")
            if not name.endswith("scales") and tensor.dtype != self.dtype:
                raise InputError(f"layer {layer}: {name} is {tensor.dtype}; gate_up is {self.dtype}, make them equal")
            if tensor.device != self.gate_up.device:
                raise InputError(f"layer {layer}: {name} is on {tensor.device}; gate_up is on {self.gate_up.device}")
            if not tensor.is_contiguous():
                raise InputError(f"layer {layer}: {name} is not contiguous; call .contiguous() on it")

    def _validate_gating(self, layer: int) -> None:
        for name, value in (("limit", self.limit), ("alpha", self.alpha), ("up_offset", self.up_offset)):
            if name == "limit" and value is None:
                continue
            is_number = type(value) in (int, float) and math.isfinite(value or 0)
            if not is_number or (name != "up_offset" and not (value or 0) > 0):
                sign = "" if name == "up_offset" else " above 0"
                raise InputError(f"layer {layer}: {name} is {shown(value)}; it must be a finite number{sign}")
        if self.alpha != 1 and self.activation != "silu":
            raise InputError(f"layer {layer}: alpha is {self.alpha}, but only silu has one, not {self.activation}")
        if self.up_offset and not self.gated:
            raise InputError(f"layer {layer}: up_offset is {self.up_offset}, but experts without a gate have no up")

    def _validate_format(self, layer: int) -> None:
        """Values and scales belong together."""
        import torch

        both = [
            scales is not None and scales.dtype == torch.float32 for scales in (self.gate_up_scales, self.down_scales)
        ]
        if (self.dtype == torch.float8_e4m3fn) != all(both) or any(both) != all(both):
            raise InputError(
                f"layer {layer}: weights are {self.dtype}; torch.float8_e4m3fn ones, and only they, come with "
                "float32 gate_up_scales and down_scales"
            )
        if not all(both):
            return
        if self.hidden % BLOCK or self.intermediate % BLOCK:
            raise InputError(
                f"layer {layer}: hidden is {self.hidden} and intermediate is {self.intermediate}; quantised experts "
                f"take multiples of {BLOCK}"
            )
        if self.gate_up_bias is not None or self.down_bias is not None:
            raise InputError(f"layer {layer}: quantised experts cannot have biases; leave them in bfloat16")


def all_finite(values: torch.Tensor) -> bool:
    """Is every value finite? A sum is not if one is not, and is quick; one that overflows says nothing."""
    import torch

    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def check_finite(weights: Sequence[ExpertWeights]) -> None:
    """Raise InputError at the first NaN or infinite weight, naming layer, tensor and global expert id.

    For load time: reads every weight once and synchronises a GPU. Takes one expert at a time, and memory for one more.
    """
    import torch

    for layer, layer_weights in enumerate(weights):
        for name, tensor in layer_weights.tensors():
            for local in range(layer_weights.num_local_experts):
                values = tensor[local].float() if tensor.dtype == torch.float8_e4m3fn else tensor[local]
                if not all_finite(values):
                    expert = layer_weights.first_expert + local
                    raise InputError(
                        f"layer {layer}, expert {expert}: {name} holds NaN or infinite values; "
                        "every weight must be finite, check the checkpoint"
                    )
