"""The 16-bit formats in which these kernels read and write rows, eight values at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipemoe_kernels.numba_cuda import SIMULATOR

if SIMULATOR:
    from pipemoe_kernels import simulated_eights as eights
    from pipemoe_kernels.simulated_warp import launch_dependents, wait_for_earlier
else:
    from pipemoe_kernels.ptx import eights
    from pipemoe_kernels.ptx.hopper import launch_dependents, wait_for_earlier

WIDTH = 8  # values that move together
BLOCK = 32 if SIMULATOR else 256  # threads, of which the simulator knows one warp
CAPABILITY = (8, 0)  # the oldest that has the instructions


@dataclass(frozen=True, slots=True)
class Format:
    """eight_of(vector) -> its 8 values in float32; vector_of(eight) -> 16 bytes of the nearest."""

    eight_of: Callable
    vector_of: Callable


FORMATS = {
    torch.bfloat16: Format(eights.eight_of_bf16, eights.bf16_of),
    torch.float16: Format(eights.eight_of_half, eights.half_of),
}

__all__ = ["BLOCK", "CAPABILITY", "FORMATS", "WIDTH", "Format", "eights", "launch_dependents", "wait_for_earlier"]


def check_rows(*rows: torch.Tensor) -> None:
    """Assert that each row of these matrices is whole vectors that lie one after another."""
    for t in rows:
        width = WIDTH if t.element_size() == 2 else 16 // t.element_size()
        assert t.dim() == 2 and t.stride(1) == 1 and t.shape[1] % WIDTH == 0, (t.shape, t.stride())
        assert t.stride(0) % width == 0 and t.data_ptr() % 16 == 0, (t.stride(), t.data_ptr())
