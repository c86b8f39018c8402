"""Experts on any GPU from compute capability 8.0 on: as hopper.py, with GEMMs through the tensor cores that all of them have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipemoe.experts.hopper import HopperExperts
from pipemoe_kernels.grouped_mma import grouped_mma

if TYPE_CHECKING:
    import torch

    from pipemoe.experts.hopper import HopperScratch
    from pipemoe.wire import WireRows
    from pipemoe_kernels.launch import Stream


class AmpereExperts(HopperExperts):
    """Only enqueues on torch's current stream, and gives a row the same bits whatever its neighbours. Implementation name "ampere"."""

    implementation = "ampere"
    supports_arrivals = False
    on_hopper = False

    def _prepare(self) -> None:
        pass

    def _gate_up(
        self, stream: Stream, layer: int, scratch: HopperScratch, rows: WireRows, offsets: torch.Tensor, a: torch.Tensor
    ) -> None:
        w = self.weights[layer]
        form = {"gated": w.gated, "activation": w.activation}
        grouped_mma(stream, rows.hidden, scratch.tokens, w.gate_up.detach(), offsets, w.gate_up_bias, a, self.num_sms, **form)

    def _down(
        self, stream: Stream, layer: int, scratch: HopperScratch, a: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor, first_column: int
    ) -> None:
        down = self.weights[layer].down.detach()[:, first_column : first_column + y.shape[1]]
        grouped_mma(stream, a, None, down, offsets, None, y, self.num_sms)
