"""Rows whose place is not known when a launch is captured in a graph: kernels read it when they run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PlacedRows:
    """place: [2] int64 on the device: the first row's address (a multiple of 16) and how many rows there are; further
    ones are not written. row_bytes: from one row to the next, a multiple of 16.
    """

    place: torch.Tensor
    row_bytes: int

    def check(self) -> None:
        place = self.place
        assert place.dtype == torch.int64 and place.shape == (2,) and place.is_contiguous(), (place.dtype, place.shape)
        assert self.row_bytes % 16 == 0, self.row_bytes
