"""The fp8 format of DeepSeek-V3: e4m3 values with a float32 scale for 1 x 128 of a row, and for 128 x 128 of a weight.

    value = e4m3 * scale        scale = (largest magnitude of the block) / 448, so that the block fills e4m3's range

A block's largest magnitude counts as at least SMALLEST_PEAK, so that zeros stay zeros. On a GPU rows are
quantised by pipemoe_kernels.quantise, to the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 128
LARGEST = 448.0
SMALLEST_PEAK = 1e-10


def num_blocks(size: int) -> int:
    return -(-size // BLOCK)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, H] floating, H a multiple of 128 -> values [n, H] float8_e4m3fn, scales [n, H/128] float32."""
    import torch

    blocks = x.float().view(len(x), x.shape[1] // BLOCK, BLOCK)
    peaks = blocks.abs().nan_to_num(0.0, torch.inf).amax(2, keepdim=True).clamp(min=SMALLEST_PEAK)
    values = (blocks * (peaks.reciprocal() * LARGEST)).to(torch.float8_e4m3fn)
    return values.view(x.shape), (peaks * (1 / LARGEST)).squeeze(2)


def dequantise_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values [n, H] float8_e4m3fn, scales [n, H/128] -> [n, H] in dtype."""
    blocks = values.float().view(len(values), values.shape[1] // BLOCK, BLOCK)
    return (blocks * scales[:, :, None]).view(values.shape).to(dtype)


def quantise_weight(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, Kd] floating -> values [N, Kd] float8_e4m3fn, scales [N/128, Kd/128] float32, both rounded up."""
    import torch

    rows, columns = num_blocks(w.shape[0]), num_blocks(w.shape[1])
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, dtype=torch.float32, device=w.device)
    padded[: w.shape[0], : w.shape[1]] = w
    peaks = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)).clamp(min=SMALLEST_PEAK)
    values = w.float() * _spread(peaks.reciprocal() * LARGEST, w.shape)
    return values.to(torch.float8_e4m3fn), peaks * (1 / LARGEST)


def dequantise_weight(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values [N, Kd] float8_e4m3fn, scales [N/128, Kd/128], both rounded up -> [N, Kd] in dtype."""
    return (values.float() * _spread(scales.float(), values.shape)).to(dtype)


def _spread(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Each block's scale, repeated for all of its values: [N, Kd]."""
    return scales.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
