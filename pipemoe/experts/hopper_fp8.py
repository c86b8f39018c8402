"""Experts in e4m3 on a Hopper GPU: rows as they came over the wire, weights as in DeepSeek-V3's checkpoints.

    e4m3 rows [n] --index--> tokens [pairs] --gate_up_fp8 (gather, GEMM, SwiGLU, quantise)--> a [pairs, I] e4m3, scales
         --down_fp8--> y [pairs, H] bfloat16 --combine--> out [n, H]

As in hopper.py, nothing is allocated, nothing synchronises the host, and a row's bits depend on the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.e4m3 import BLOCK
from pipemoe.errors import ConfigError
from pipemoe.experts.hopper import HopperExperts
from pipemoe.experts.quantised import quantise_experts
from pipemoe.experts.weights import ExpertWeights
from pipemoe_kernels.gemm.fp8 import PackedDownFp8, PackedGateUpFp8, grouped_fp8_kernel, row_maps, weight_map
from pipemoe_kernels.index.hopper import MAX_BLOCKS
from pipemoe_kernels.launch.tensor_map import MAP_BYTES, device_maps

if TYPE_CHECKING:
    from pipemoe.experts.prepared_call import PackedDown, PackedGateUp, PreparedCall
    from pipemoe_kernels.gemm.tile_shape import TileShape
    from pipemoe_kernels.launch.kernel import Kernel

E4M3 = torch.float8_e4m3fn


def unsupported_format(weights: Sequence[ExpertWeights], hidden: int) -> str | None:
    """Why these experts cannot be in e4m3, or None."""
    sizes = [hidden, *(w.intermediate for w in weights)]
    if any(size % BLOCK for size in sizes):
        return f"hidden and intermediate are {sizes}; hopper_fp8 experts take multiples of {BLOCK}"
    if any(w.gate_up_bias is not None or w.down_bias is not None for w in weights):
        return "the experts have biases, which hopper_fp8 experts do not take"
    if any(not w.gated or w.gating != "silu" for w in weights):
        return "the experts have no gate, or another activation than silu; hopper_fp8 experts take gated ones with silu"
    return None


class HopperFp8Scratch:
    """Memory of one slot for up to `max_rows` rows."""

    transient_bytes = 0

    def __init__(self, experts: HopperFp8Experts, max_rows: int):
        num_pairs = experts.max_pairs(max_rows)
        num_local = experts.max_local_experts

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=experts.device)

        self.max_rows = max_rows
        self.calls: dict[tuple[object, ...], PreparedCall] = {}  # by layout
        self.positions = empty(max_rows, experts.top_k)
        self.tokens = empty(num_pairs)
        self.offsets = empty(num_local)
        self.block_counts = empty(MAX_BLOCKS * num_local)
        self.a = empty(num_pairs * experts.max_intermediate, dtype=E4M3)
        self.a_scales = empty(experts.max_intermediate // BLOCK, -(-num_pairs // 4) * 4, dtype=torch.float32)
        self.y = empty(num_pairs, experts.hidden, dtype=torch.bfloat16)
        # A layer's intermediate -> address of the maps of `a` with rows of that length.
        self.a_maps = {}
        maps: list[Any] = []
        sizes = sorted({w.intermediate for w in experts.weights}) if num_pairs else []
        for size in sizes:
            self.a_maps[size] = len(maps) * MAP_BYTES
            maps += row_maps(self.a[: num_pairs * size].view(num_pairs, size), self.a_scales[: size // BLOCK])
        self.maps = device_maps(maps, experts.device)
        self.a_maps = {size: self.maps.data_ptr() + offset for size, offset in self.a_maps.items()}
        self.num_bytes = sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


class HopperFp8Experts(HopperExperts):
    """The experts call on CUDA tensors with e4m3 rows. Implementation name "hopper_fp8".

    weights: quantised, or bfloat16; of the latter a quantised copy is made here, so the caller may free them.
    """

    implementation = "hopper_fp8"

    def _prepare(self) -> None:
        if reason := unsupported_format(self.weights, self.hidden):
            raise ConfigError(reason)
        self.weights = tuple(w if w.is_quantised else quantise_experts(w) for w in self.weights)
        self.wire_dtype = E4M3
        maps: list[Any] = []
        self._layers = []
        for w in self.weights:
            self._layers.append(len(maps))
            if w.num_local_experts:
                maps += [weight_map(w.gate_up.detach(), gated=True), weight_map(w.down.detach(), gated=False)]
        self._maps = device_maps(maps, self.device)

    def _gemm_kernels(self) -> list[Kernel]:
        return [grouped_fp8_kernel(gated=gated) for gated in (True, False)]

    # Scratches come from `new_scratch` of the same object, so the narrower types below are safe.
    def new_scratch(self, max_rows: int) -> HopperFp8Scratch:  # type: ignore[override]
        self.check_max_rows(max_rows)
        return HopperFp8Scratch(self, max_rows)

    def _pack_gate_up(  # type: ignore[override]
        self,
        layer: int,
        shape: TileShape,
        scratch: HopperFp8Scratch,
        hidden: torch.Tensor,
        offsets: torch.Tensor,
        a: torch.Tensor,
    ) -> PackedGateUp:
        weight_map, scales = self._maps.data_ptr() + MAP_BYTES * self._layers[layer], self.weights[layer].gate_up_scales
        assert scales is not None  # `_prepare` has quantised all weights
        a_scales = scratch.a_scales[: a.shape[1] // BLOCK]
        return PackedGateUpFp8(
            a.get_device(), hidden, scratch.tokens, weight_map, scales, offsets, a, a_scales, self.num_sms
        )

    def _pack_down(  # type: ignore[override]
        self,
        layer: int,
        shape: TileShape,
        scratch: HopperFp8Scratch,
        a: torch.Tensor,
        offsets: torch.Tensor,
    ) -> PackedDown:
        weight_map = self._maps.data_ptr() + MAP_BYTES * (self._layers[layer] + 1)
        scales = self.weights[layer].down_scales
        assert scales is not None  # `_prepare` has quantised all weights
        return PackedDownFp8(
            a.get_device(),
            scratch.a_maps[a.shape[1]],
            weight_map,
            scales,
            offsets,
            scratch.y,
            self.num_sms,
            may_start_early=not self._leaves_sms,
        )
