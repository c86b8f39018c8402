"""What the arrival-driven GEMMs know of a wave: its parts, their index, and the words that say which are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipemoe_kernels.gemm.arrivals.raster import MAX_PARTS
from pipemoe_kernels.gemm.raster import MAX_EXPERTS


@dataclass(frozen=True)
class Parts:
    """Rows of a wave in the parts in which they arrive, and the index of each (see index/hopper.py).

    first_rows: of each part, ascending; no part is empty. top_k: K. tokens [pairs] int32: a part's tokens stand from
    place K * its first row on, and count from its first row. ends [S, E_loc] int32, rows E_loc apart: ends of the
    experts' places, counted from the part's first place. flags [S] int32: a part is there when its flag is `epoch`.
    batches [S] int64: they do not hold a word of this epoch yet.
    """

    first_rows: Sequence[int]
    top_k: int
    tokens: torch.Tensor
    ends: torch.Tensor
    flags: torch.Tensor
    batches: torch.Tensor
    epoch: int

    def arguments(self) -> tuple[torch.Tensor | int, ...]:
        """For the kernels' parameters from `tokens` to `batches`."""
        count = len(self.first_rows)
        assert 1 <= count <= MAX_PARTS and 0 < self.epoch < 2**31, (count, self.epoch)
        assert (
            self.tokens.dtype == self.ends.dtype == self.flags.dtype == torch.int32
            and self.batches.dtype == torch.int64
        )
        assert self.ends.is_contiguous() and self.ends.shape[0] >= count and self.ends.shape[1] <= MAX_EXPERTS, (
            self.ends.shape
        )
        assert (
            self.flags.is_contiguous()
            and self.batches.is_contiguous()
            and min(len(self.flags), len(self.batches)) >= count
        )
        rows = [*self.first_rows, *[0] * (MAX_PARTS - count)]
        return (self.tokens, self.top_k, self.ends, count, *rows, self.flags, self.epoch, self.batches)
