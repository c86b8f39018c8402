"""The wire format of a dispatch: one row per token, everything a remote expert needs in one piece of memory.

    byte 0            hidden              weights      ids          pad
    | x_0 ... x_(H-1) | w_0 ... w_(K-1)  | e_0 ... e_(K-1) | 0 ... |
      dtype             float32            int32             to a multiple of 128 bytes

The router runs on the owner, so ids are global expert ids; -1 means "no expert here" (padding rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROW_ALIGNMENT = 128  # bytes; a whole number of 16-byte vectors and of cache lines


@dataclass(frozen=True)
class WireFormat:
    """Layout of a dispatch row for `hidden` values of `dtype` and `top_k` routed experts."""

    hidden: int
    top_k: int
    dtype: torch.dtype

    @cached_property
    def weights_offset(self) -> int:
        """Byte offset of the first router weight (4-byte aligned for an odd `hidden` of 2-byte values)."""
        return -(-self.hidden * self.dtype.itemsize // 4) * 4

    @cached_property
    def ids_offset(self) -> int:
        return self.weights_offset + 4 * self.top_k

    @cached_property
    def row_bytes(self) -> int:
        return -(-(self.ids_offset + 4 * self.top_k) // ROW_ALIGNMENT) * ROW_ALIGNMENT

    def rows(self, buffer: torch.Tensor) -> WireRows:
        """View a contiguous uint8 `buffer` [n, row_bytes] as wire rows; no copy."""
        import torch

        w, e = self.weights_offset // 4, self.ids_offset // 4
        return WireRows(
            buffer=buffer,
            hidden=buffer.view(self.dtype)[:, : self.hidden],
            weights=buffer.view(torch.float32)[:, w : w + self.top_k],
            ids=buffer.view(torch.int32)[:, e : e + self.top_k],
        )


@dataclass(frozen=True, slots=True)
class WireRows:
    """Views of n wire rows in one buffer."""

    buffer: torch.Tensor  # [n, row_bytes] uint8
    hidden: torch.Tensor  # [n, H] dtype, row stride row_bytes
    weights: torch.Tensor  # [n, K] float32, row stride row_bytes
    ids: torch.Tensor  # [n, K] int32, row stride row_bytes

    def __len__(self) -> int:
        return len(self.buffer)

    def __getitem__(self, rows: slice) -> WireRows:
        return WireRows(self.buffer[rows], self.hidden[rows], self.weights[rows], self.ids[rows])

    def write(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Fill the rows; `hidden` [n, H] dtype, `ids` [n, K] int32, `weights` [n, K] float32."""
        self.hidden.copy_(hidden)
        self.ids.copy_(ids)
        self.weights.copy_(weights)
