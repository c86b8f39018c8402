"""MXFP4, the format of GPT-OSS: 4-bit values (e2m1), 32 of a row with one scale, a power of two (e8m0).

    blocks [..., N/32, 16] uint8: two values a byte, the first in the low half    scales [..., N/32] uint8: 2^(s - 127)

OCP Microscaling Formats (MX), version 1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the fourth bit is the sign


def widen(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks [..., N/32, 16] and scales [..., N/32] uint8 -> [..., N] in dtype."""
    import torch

    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)], dtype=torch.float32, device=blocks.device)
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1)  # [..., N/32, 16, 2]
    values = table[pairs.int()].flatten(-2)  # [..., N/32, 32]
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2).to(dtype)
