"""Rows that travel as e4m3, for experts that take wider rows.

    e4m3 rows --dequantise--> rows in the model's dtype --inner experts--> out

Half the bytes on the wire, with any experts; only "hopper_fp8" ones multiply e4m3 as it is.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.e4m3 import dequantise_rows
from pipemoe.errors import InputError
from pipemoe.experts.protocol import Experts, Scratch
from pipemoe.wire import ScatteredRows, WireFormat

if TYPE_CHECKING:
    from pipemoe.wire import WireRows


class DequantisingScratch:
    """The inner experts' scratch, and room for `max_rows` dequantised wire rows."""

    def __init__(self, inner: Scratch, wire: WireFormat, device: torch.device):
        self.inner = inner
        self.max_rows = inner.max_rows
        self.rows = wire.rows(torch.zeros((inner.max_rows, wire.row_bytes), dtype=torch.uint8, device=device))
        self.num_bytes = inner.num_bytes + self.rows.buffer.nbytes
        self.transient_bytes = inner.transient_bytes


class DequantisingExperts:
    """Calls `inner` on e4m3 rows, dequantised; results are as deterministic as those of `inner`."""

    wire_dtype = torch.float8_e4m3fn
    only_launches = False

    def __init__(self, inner: Experts, *, hidden: int, top_k: int, device: torch.device, dtype: torch.dtype):
        self._inner: Any = inner  # host experts take scattered rows too
        self._device = device
        self._wire = WireFormat(hidden, top_k, dtype)
        self._narrow = WireFormat(hidden, top_k, self.wire_dtype)
        self.implementation = inner.implementation
        self.deterministic = inner.deterministic
        self.num_sms = inner.num_sms

    def with_free_sms(self, num_sms: int) -> DequantisingExperts:
        """See ExpertsShape.with_free_sms."""
        other = copy.copy(self)
        other._inner = self._inner.with_free_sms(num_sms)
        other.num_sms = other._inner.num_sms
        return other

    def new_scratch(self, max_rows: int) -> DequantisingScratch:
        return DequantisingScratch(self._inner.new_scratch(max_rows), self._wire, self._device)

    def warm_up(self, scratch: DequantisingScratch) -> None:
        num_rows = min(1, scratch.max_rows)
        rows = self._narrow.rows(
            torch.zeros((num_rows, self._narrow.row_bytes), dtype=torch.uint8, device=self._device)
        )
        self._dequantise(rows, scratch.rows[:num_rows])
        self._inner.warm_up(scratch.inner)

    @torch.no_grad()
    def __call__(
        self, layer: int, rows: WireRows | ScatteredRows, out: torch.Tensor, scratch: DequantisingScratch
    ) -> None:
        if len(rows) > scratch.max_rows or any(p.hidden.dtype != self.wire_dtype for _, p in rows.pieces):
            found = {str(piece.hidden.dtype) for _, piece in rows.pieces}
            raise InputError(
                f"layer {layer}: {len(rows)} rows of {', '.join(found)}; at most {scratch.max_rows} of "
                f"{self.wire_dtype} are wanted"
            )
        if isinstance(rows, ScatteredRows):
            wide = [(first, scratch.rows[first : first + len(piece)]) for first, piece in rows.pieces]
            for (_, piece), (_, into) in zip(rows.pieces, wide, strict=True):
                self._dequantise(piece, into)
            self._inner(layer, ScatteredRows(wide, len(rows)), out, scratch.inner)
        else:
            self._dequantise(rows, scratch.rows[: len(rows)])
            self._inner(layer, scratch.rows[: len(rows)], out, scratch.inner)

    def _dequantise(self, rows: WireRows, wide: WireRows) -> None:
        assert rows.scales is not None  # e4m3 rows have them
        wide.ids.copy_(rows.ids)
        wide.weights.copy_(rows.weights)
        if self._device.type == "cpu":
            wide.hidden.copy_(dequantise_rows(rows.hidden, rows.scales, wide.hidden.dtype))
        elif len(rows):
            from pipemoe_kernels import quantise
            from pipemoe_kernels.launch.kernel import Stream

            quantise.dequantise_rows(Stream.current(rows.buffer.device), rows.hidden, rows.scales, wide.hidden)
