"""Experts on any GPU from compute capability 8.0 on: hopper.py with GEMMs by mma.sync, which all of these have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipemoe.experts.hopper import HopperExperts
from pipemoe_kernels.gemm.mma import grouped_mma_kernel
from pipemoe_kernels.gemm.packed_mma import PackedMma

if TYPE_CHECKING:
    import torch

    from pipemoe.experts.hopper import HopperScratch
    from pipemoe.experts.prepared_call import PackedDown, PackedGateUp
    from pipemoe_kernels.gemm.tile_shape import TileShape
    from pipemoe_kernels.launch.kernel import Kernel


class AmpereExperts(HopperExperts):
    """Only enqueues on torch's current stream; a row's bits do not depend on its neighbours. Name: "ampere"."""

    implementation = "ampere"
    on_hopper = False

    def _prepare(self) -> None:
        pass

    def _gemm_kernels(self) -> list[Kernel]:
        forms = {(w.gated, w.gate_up_bias is not None, w.gating) for w in self.weights} | {(False, False, None)}
        return [
            grouped_mma_kernel(gated=gated, has_bias=has_bias, activation=activation)
            for gated, has_bias, activation in forms
        ]

    def _pack_gate_up(
        self,
        layer: int,
        shape: TileShape,
        scratch: HopperScratch,
        hidden: torch.Tensor,
        offsets: torch.Tensor,
        a: torch.Tensor,
    ) -> PackedGateUp:
        w = self.weights[layer]
        return PackedMma(
            a.get_device(),
            hidden,
            scratch.tokens,
            w.gate_up.detach(),
            offsets,
            w.gate_up_bias,
            a,
            self.num_sms,
            gated=w.gated,
            activation=w.gating,
        )

    def _pack_down(
        self,
        layer: int,
        shape: TileShape,
        scratch: HopperScratch,
        a: torch.Tensor,
        offsets: torch.Tensor,
    ) -> PackedDown:
        y, down = scratch.y, self.weights[layer].down.detach()
        packed, address = PackedMma(y.get_device(), a, None, down, offsets, None, y, self.num_sms), a.data_ptr()
        return lambda stream, num_pairs: packed(stream, address, num_pairs)
