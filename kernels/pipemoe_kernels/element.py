"""Number formats of matrices in device memory: how a kernel reads one as float32, and writes one.

Numba has no bfloat16 array that torch could hand over, so 16-bit formats travel as uint16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipemoe_kernels.numba_cuda import SIMULATOR, types

if SIMULATOR:
    from pipemoe_kernels import simulated as operations
else:
    from pipemoe_kernels.ptx import access as operations

load_vector, store_vector = operations.load_vector, operations.store_vector
load_e4m3, to_e4m3 = operations.load_e4m3, operations.to_e4m3


@dataclass(frozen=True)
class Element:
    """One number format. load(p, i) -> float32 (float64 for float64); store(p, i, value)."""

    bits: types.Type
    load: Callable
    store: Callable

    @property
    def pointer(self) -> types.Type:
        return types.CPointer(self.bits)


ELEMENTS = {
    torch.float64: Element(types.float64, operations.load_plain, operations.store_plain),
    torch.float32: Element(types.float32, operations.load_plain, operations.store_plain),
    torch.bfloat16: Element(types.uint16, operations.load_bf16, operations.store_bf16),
    torch.float16: Element(types.uint16, operations.load_half, operations.store_half),
}
