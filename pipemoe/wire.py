"""The wire format of a dispatch: one row per token, everything a remote expert needs in one piece of memory.

    byte 0            hidden              weights      ids          pad
    | x_0 ... x_(H-1) | w_0 ... w_(K-1)  | e_0 ... e_(K-1) | 0 ... |
      dtype             float32            int32             to a multiple of 128 bytes

    with dtype float8_e4m3fn, a scale for each 128 values; x_h is their product
    | x_0 ... x_(H-1) | s_0 ... s_(H/128-1) | w_0 ... | e_0 ... | 0 ... |
                        float32

The router runs on the owner, so ids are global expert ids; -1 means "no expert here" (padding rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from pipemoe.e4m3 import BLOCK, quantise_rows
from pipemoe.errors import ConfigError
from pipemoe.plan.row import row_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class WireFormat:
    """Layout of a dispatch row for `hidden` values of `dtype` and `top_k` routed experts.

    Raises ConfigError for float8_e4m3fn unless `hidden` is a multiple of 128.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.num_scales and self.hidden % BLOCK:
            raise ConfigError(
                f"hidden is {self.hidden}; rows travel as float8_e4m3fn only if it is a multiple of {BLOCK}"
            )

    @cached_property
    def num_scales(self) -> int:
        """Float32 scales behind the hidden values; 0 unless they are float8_e4m3fn."""
        import torch

        return -(-self.hidden // BLOCK) if self.dtype == torch.float8_e4m3fn else 0

    @cached_property
    def scales_offset(self) -> int:
        """Byte offset behind the hidden values (4-byte aligned for an odd `hidden` of 2-byte values)."""
        return -(-self.hidden * self.dtype.itemsize // 4) * 4

    @cached_property
    def weights_offset(self) -> int:
        """Byte offset of the first router weight."""
        return self.scales_offset + 4 * self.num_scales

    @cached_property
    def ids_offset(self) -> int:
        return self.weights_offset + 4 * self.top_k

    @cached_property
    def row_bytes(self) -> int:
        return row_bytes(self.hidden, self.dtype.itemsize, self.top_k, self.num_scales)

    def rows(self, buffer: torch.Tensor) -> WireRows:
        """View a contiguous uint8 `buffer` [n, row_bytes] as wire rows; no copy."""
        import torch

        s, w, e = self.scales_offset // 4, self.weights_offset // 4, self.ids_offset // 4
        return WireRows(
            buffer=buffer,
            hidden=buffer.view(self.dtype)[:, : self.hidden],
            weights=buffer.view(torch.float32)[:, w : w + self.top_k],
            ids=buffer.view(torch.int32)[:, e : e + self.top_k],
            scales=buffer.view(torch.float32)[:, s:w] if self.num_scales else None,
        )

    def warm_up(self, device: torch.device, dtype: torch.dtype) -> None:
        """Write a row from hidden values of `dtype`, so that no later write on `device` compiles or loads anything."""
        import torch

        def zeros(columns: int, kind: torch.dtype) -> torch.Tensor:
            return torch.zeros((1, columns), dtype=kind, device=device)

        rows = self.rows(zeros(self.row_bytes, torch.uint8))
        rows.write(zeros(self.hidden, dtype), zeros(self.top_k, torch.int32), zeros(self.top_k, torch.float32))


_layouts: dict[tuple[object, ...], int] = {}  # all that there have been, numbered


@dataclass(frozen=True)
class WireRows:
    """Views of n wire rows in one buffer."""

    buffer: torch.Tensor  # [n, row_bytes] uint8
    hidden: torch.Tensor  # [n, H] dtype, row stride row_bytes
    weights: torch.Tensor  # [n, K] float32, row stride row_bytes
    ids: torch.Tensor  # [n, K] int32, row stride row_bytes
    scales: torch.Tensor | None = None  # [n, H/128] float32, row stride row_bytes, if hidden is float8_e4m3fn

    def __len__(self) -> int:
        return len(self.buffer)

    @cached_property
    def layout(self) -> int:
        """A number for where everything lies in a row, dtypes and the device: equal for rows that differ in nothing but
        how many they are, and their addresses. -1 where not all views have as many rows."""
        views = self.hidden, self.ids, self.weights
        if any(len(view) != len(self) for view in views):
            return -1
        found = tuple((view.get_device(), view.dtype, view.shape[1:], view.stride()) for view in views)
        return _layouts.setdefault(found, len(_layouts))

    @property
    def places(self) -> np.ndarray:
        """[1, 5] int64, for rows on the host: see ScatteredRows."""
        import numpy as np

        addresses = self.hidden.data_ptr(), self.ids.data_ptr(), self.weights.data_ptr()
        return np.array([[*addresses, len(self), 0]], np.int64)

    @property
    def pieces(self) -> list[tuple[int, WireRows]]:
        """As of ScatteredRows: one piece."""
        return [(0, self)]

    @property
    def ranges(self) -> np.ndarray:
        """[1, 2] int64: the first row, and behind the last."""
        import numpy as np

        return np.array([[0, len(self)]], np.int64)

    @property
    def stride(self) -> int:
        """Bytes from row to row."""
        return self.buffer.stride(0)

    def __getitem__(self, rows: slice) -> WireRows:
        scales = None if self.scales is None else self.scales[rows]
        return WireRows(self.buffer[rows], self.hidden[rows], self.weights[rows], self.ids[rows], scales)

    def write(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Fill the rows; `hidden` [n, H] dtype, or wider if the rows' are float8_e4m3fn, `ids` [n, K] int32, `weights`
        [n, K] float32.
        """
        if hidden.is_cuda and len(self) and self.is_packed(hidden, ids, weights):
            self._pack(hidden, ids, weights)
            return
        if self.scales is None:
            self.hidden.copy_(hidden)
        else:
            self._quantise(hidden)
        self.ids.copy_(ids)
        self.weights.copy_(weights)

    def is_packed(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> bool:
        """Does one kernel write such values on a GPU, and nothing else?"""
        from pipemoe_kernels import pack

        wanted = [t.dtype for t in (self.hidden, self.ids, self.weights)]
        return self.scales is None and [hidden.dtype, ids.dtype, weights.dtype] == wanted and pack.fits(hidden)

    def _pack(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        from pipemoe_kernels import pack
        from pipemoe_kernels.launch.kernel import Stream

        pack.pack_rows(Stream.current(hidden.device), hidden, ids, weights, self.hidden, self.buffer.shape[1])

    def _quantise(self, hidden: torch.Tensor) -> None:
        assert self.scales is not None
        if hidden.device.type == "cpu":
            values, scales = quantise_rows(hidden)
            self.hidden.copy_(values)
            self.scales.copy_(scales)
        elif len(hidden):
            from pipemoe_kernels import quantise
            from pipemoe_kernels.launch.kernel import Stream

            quantise.quantise_rows(Stream.current(hidden.device), hidden, self.hidden, self.scales)


class ScatteredRows:
    """The wire rows of a wave where they lie, on the host: in pieces, in memory of the ranks that own them."""

    def __init__(self, pieces: Sequence[tuple[int, WireRows]], num_rows: int) -> None:
        """pieces: the wave's row that each begins at, and its rows. num_rows: of the wave, padding included."""
        import numpy as np

        self.pieces, self._num_rows = [piece for piece in pieces if len(piece[1])], num_rows
        self.stride = self.pieces[0][1].stride if self.pieces else 0
        # Per piece: addresses of its hidden values, ids and weights; how many rows it has; where they begin.
        self.places = np.concatenate([np.empty((0, 5), np.int64)] + [rows.places for _, rows in self.pieces])
        self.places[:, 4] = [first for first, _ in self.pieces]
        # Per piece: its first row, and behind its last.
        self.ranges = np.array([(first, first + len(rows)) for first, rows in self.pieces], np.int64).reshape(-1, 2)
        self.checked_by: object = None  # the experts that have found the pieces to be as they want them

    def __len__(self) -> int:
        return self._num_rows
