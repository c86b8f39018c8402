"""Experts in e4m3 on a Hopper GPU: rows as they came over the wire, weights as in DeepSeek-V3's checkpoints.

    e4m3 rows [n] --index--> tokens [pairs] --gate_up_fp8 (gather, GEMM, SwiGLU, quantise)--> a [pairs, I] e4m3, scales
         --down_fp8--> y [pairs, H] bfloat16 --combine--> out [n, H]

Like hopper.py's otherwise: nothing is allocated, nothing synchronises the host, a row's bits depend on the row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pipemoe.e4m3 import BLOCK
from pipemoe.errors import ConfigError
from pipemoe.experts.hopper import CAPABILITY, HopperExperts
from pipemoe.experts.protocol import ExpertsShape
from pipemoe.experts.quantised import quantise_experts
from pipemoe.experts.weights import ExpertWeights
from pipemoe_kernels.combine import combine_rows
from pipemoe_kernels.combine_lanes import combine_lanes, fits
from pipemoe_kernels.grouped_fp8 import down_fp8, gate_up_fp8, row_maps, weight_map
from pipemoe_kernels.index_hopper import MAX_BLOCKS, MAX_EXPERTS, index_local_pairs
from pipemoe_kernels.launch import Stream
from pipemoe_kernels.tensor_map import MAP_BYTES, device_maps

if TYPE_CHECKING:
    from pipemoe.wire import WireRows

E4M3 = torch.float8_e4m3fn


def unsupported(weights: Sequence[ExpertWeights], hidden: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these experts cannot run here, or None."""
    if torch.cuda.get_device_capability(device) != CAPABILITY:
        return f"{device} is not of compute capability 9.0; hopper_fp8 experts need it"
    if dtype != torch.bfloat16:
        return f"dtype is {dtype}; hopper_fp8 experts give torch.bfloat16 rows"
    sizes = [hidden, *(w.intermediate for w in weights)]
    if any(size % BLOCK for size in sizes):
        return f"hidden and intermediate are {sizes}; hopper_fp8 experts take multiples of {BLOCK}"
    if any(w.gate_up_bias is not None or w.down_bias is not None for w in weights):
        return "the experts have biases, which hopper_fp8 experts do not take"
    num_local = max((w.num_local_experts for w in weights), default=0)
    if num_local > MAX_EXPERTS:
        return f"a rank would hold {num_local} experts; the kernels take at most {MAX_EXPERTS}: use more ranks"
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
        self.positions = empty(max_rows, experts.top_k)
        self.tokens = empty(num_pairs)
        self.offsets = empty(num_local)
        self.block_counts = empty(MAX_BLOCKS * num_local)
        self.a = empty(num_pairs * experts.max_intermediate, dtype=E4M3)
        self.a_scales = empty(experts.max_intermediate // BLOCK, -(-num_pairs // 4) * 4, dtype=torch.float32)
        self.y = empty(num_pairs, experts.hidden, dtype=torch.bfloat16)
        # A layer's intermediate -> address of the maps of `a` with rows of that length.
        self.a_maps = {}
        maps = []
        sizes = sorted({w.intermediate for w in experts.weights}) if num_pairs else []
        for size in sizes:
            self.a_maps[size] = len(maps) * MAP_BYTES
            maps += row_maps(self.a[: num_pairs * size].view(num_pairs, size), self.a_scales[: size // BLOCK])
        self.maps = device_maps(maps, experts.device)
        self.a_maps = {size: self.maps.data_ptr() + offset for size, offset in self.a_maps.items()}
        self.num_bytes = sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


class HopperFp8Experts(HopperExperts):
    """The experts call on CUDA tensors with e4m3 rows. Implementation name "hopper_fp8".

    weights: quantised, or bfloat16, of which a quantised copy is made here; the latter may then be freed by the caller.
    """

    implementation = "hopper_fp8"

    def __init__(
        self,
        weights: Sequence[ExpertWeights],
        *,
        top_k: int,
        hidden: int,
        device: torch.device,
        dtype: torch.dtype,
        deterministic: bool = False,
        num_sms: int | None = None,
    ):
        settings = {"top_k": top_k, "hidden": hidden, "device": device, "dtype": dtype, "deterministic": deterministic}
        ExpertsShape.__init__(self, weights, **settings)
        if reason := unsupported(weights, hidden, device, dtype):
            raise ConfigError(reason)
        self.weights = tuple(w if w.is_quantised else quantise_experts(w) for w in weights)
        self.wire_dtype = E4M3
        self.num_sms = num_sms or torch.cuda.get_device_properties(device).multi_processor_count
        maps = []
        self._layers = []
        for w in self.weights:
            self._layers.append(len(maps))
            if w.num_local_experts:
                maps += [weight_map(w.gate_up.detach(), gated=True), weight_map(w.down.detach(), gated=False)]
        self._maps = device_maps(maps, device)

    def new_scratch(self, max_rows: int) -> HopperFp8Scratch:
        self.check_max_rows(max_rows)
        return HopperFp8Scratch(self, max_rows)

    @torch.no_grad()
    def __call__(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: HopperFp8Scratch) -> None:
        self.check_call(layer, rows, out, scratch.max_rows)
        weights = self.weights[layer]
        num_rows, num_local = len(rows), weights.num_local_experts
        if num_rows == 0:
            return
        if num_local == 0:
            out.zero_()
            return
        stream = Stream.current(out.device)
        num_pairs, intermediate = num_rows * self.top_k, weights.intermediate
        offsets, positions = scratch.offsets[:num_local], scratch.positions[:num_rows]
        ids, first_expert, tokens = rows.ids, weights.first_expert, scratch.tokens
        index_local_pairs(stream, ids, first_expert, num_local, scratch.block_counts, offsets, positions, tokens)
        a = scratch.a[: num_pairs * intermediate].view(num_pairs, intermediate)
        a_scales, y = scratch.a_scales[: intermediate // BLOCK], scratch.y[:num_pairs]
        maps = self._maps.data_ptr() + MAP_BYTES * self._layers[layer]
        gate_up_fp8(stream, rows.hidden, tokens, maps, weights.gate_up_scales, offsets, a, a_scales, self.num_sms)
        a_maps = scratch.a_maps[intermediate]
        down_fp8(stream, a_maps, maps + MAP_BYTES, weights.down_scales, offsets, y, self.num_sms)
        combine = combine_lanes if fits(self.hidden, out) else combine_rows
        combine(stream, y, positions, ids, first_expert, rows.weights, None, out)
