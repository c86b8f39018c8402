"""Experts on a Hopper GPU: tensor-core kernels that gather rows straight from the wire buffer.

    rows [n] --index--> tokens [pairs] --gate_up_rows (gather, GEMM, activation)--> a [pairs, I]
      --down_rows--> y [pairs, H] --combine--> out [n, H]

Nothing is allocated and nothing synchronises the host. Launches are packed at a layer's first call with a scratch and a
layout of rows and out (prepared_call.py). The GEMMs run in persistent thread blocks, one on each of num_sms
multiprocessors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.errors import ConfigError
from pipemoe.experts.prepared_call import PackedDown, PackedGateUp, PreparedCall
from pipemoe.experts.protocol import ExpertsShape
from pipemoe.experts.weights import ExpertWeights
from pipemoe.wire import WireFormat
from pipemoe_kernels.gemm import few_experts, packed_wgmma
from pipemoe_kernels.gemm.roles import PART_COLUMNS
from pipemoe_kernels.gemm.tile_shape import ROWS_128, SHAPES, TileShape, shape_for
from pipemoe_kernels.gemm.wgmma import GroupedKernel, grouped_kernel
from pipemoe_kernels.index.hopper import MAX_BLOCKS, MAX_EXPERTS, PackedIndex, index_kernels
from pipemoe_kernels.launch.build_ahead import load_all
from pipemoe_kernels.launch.kernel import Kernel, Stream
from pipemoe_kernels.launch.tensor_map import MAP_BYTES, device_maps, tensor_map

if TYPE_CHECKING:
    from pipemoe.wire import WireRows

CAPABILITY, LEAST_CAPABILITY = (9, 0), (8, 0)
# A scratch keeps so many prepared calls of a layer. Only a caller whose tensors have no steady layout makes more.
MAX_LAYOUTS = 64


def unsupported(
    weights: Sequence[ExpertWeights],
    hidden: int,
    device: torch.device,
    dtype: torch.dtype,
    implementation: str = "hopper",
) -> str | None:
    """Why these experts cannot run here as `implementation`, one of "hopper", "hopper_fp8" and "ampere", or None."""
    capability = torch.cuda.get_device_capability(device)
    if implementation != "ampere" and capability != CAPABILITY:
        return f"{device} is not of compute capability 9.0"
    if capability < LEAST_CAPABILITY:
        return f"{device} is not of compute capability 8.0 or newer"
    if dtype != torch.bfloat16:
        return f"dtype is {dtype}; {implementation} experts take torch.bfloat16"
    sizes = [hidden, *(w.intermediate for w in weights)]
    if any(size % PART_COLUMNS for size in sizes):
        return f"hidden and intermediate are {sizes}; {implementation} experts take multiples of {PART_COLUMNS}"
    num_local = max((w.num_local_experts for w in weights), default=0)
    if num_local > MAX_EXPERTS:
        return f"a rank would hold {num_local} experts; the kernels take at most {MAX_EXPERTS}: use more ranks"
    return None


class HopperScratch:
    """Memory of one slot for up to `max_rows` rows."""

    transient_bytes = 0

    def __init__(self, experts: HopperExperts, max_rows: int):
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
        self.a = empty(num_pairs * experts.max_intermediate, dtype=torch.bfloat16)
        self.y = empty(num_pairs, experts.hidden, dtype=torch.bfloat16)
        # A layer's intermediate and a shape of tiles -> address of the maps of `a`, with rows of that length and boxes
        # of that shape.
        sizes = sorted({w.intermediate for w in experts.weights}) if num_pairs and experts.on_hopper else []
        views = {size: self.a[: num_pairs * size].view(num_pairs, size) for size in sizes}
        places: dict[tuple[int, TileShape], int] = {}
        maps: list[Any] = []
        for size, view in views.items():
            for shape in experts.shapes:
                places[size, shape] = len(maps)
                maps += [tensor_map(view, box) for box in shape.x_boxes]
        self.maps = device_maps(maps, experts.device)
        self.a_maps = {key: self.maps.data_ptr() + MAP_BYTES * place for key, place in places.items()}
        self.num_bytes = sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


class HopperExperts(ExpertsShape):
    """The experts call on CUDA tensors: only enqueues on torch's current stream. Implementation name "hopper".

    Every kernel sums a row's products in an order that depends only on the sizes of the matrices, so a row's bits
    depend on the row alone. deterministic: the sum over ranks is exact too (see pipemoe_kernels.combine). num_sms:
    thread blocks of the GEMMs; None: one for each multiprocessor. num_experts: of all ranks together; with it, the
    bfloat16 GEMMs choose their tiles by the rows that an expert can expect. tile_rows: always this one of
    tile_shape.SHAPES.
    """

    implementation = "hopper"
    only_launches = True
    on_hopper = True  # may kernels use instructions that only Hopper has?

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
        num_experts: int | None = None,
        tile_rows: int | None = None,
    ):
        super().__init__(weights, top_k=top_k, hidden=hidden, device=device, dtype=dtype, deterministic=deterministic)
        if reason := unsupported(weights, hidden, device, dtype, self.implementation):
            raise ConfigError(reason)
        self.num_sms = num_sms or torch.cuda.get_device_properties(device).multi_processor_count
        # To others: blocks of the second GEMM and the sums must then not wait there for the previous kernel.
        self._leaves_sms = False
        self._num_experts = num_experts
        self._shape_of: dict[tuple[int, int], TileShape] = {}  # by layer and rows
        self.shapes = (SHAPES[tile_rows],) if tile_rows else tuple(SHAPES.values()) if num_experts else (ROWS_128,)
        self._prepare()

    def _prepare(self) -> None:
        """Make what the GEMMs of each layer need."""
        maps: list[Any] = []
        self._first_maps = []  # of each layer: gate_up's, down's
        for layer, w in enumerate(self.weights):
            boxes = self._gate_up_kernel(layer, self.shapes[0]).w_boxes  # the same in all shapes
            self._first_maps.append((len(maps), len(maps) + len(boxes)))
            if w.num_local_experts:
                maps += [tensor_map(w.gate_up.detach(), box) for box in boxes]
                maps += [tensor_map(w.down.detach(), box) for box in self._down_kernel(self.shapes[0]).w_boxes]
        self._maps = device_maps(maps, self.device)

    def _gate_up_kernel(self, layer: int, shape: TileShape) -> GroupedKernel:
        w = self.weights[layer]
        return grouped_kernel(gated=w.gated, has_bias=w.gate_up_bias is not None, activation=w.gating, shape=shape)

    def _down_kernel(self, shape: TileShape) -> GroupedKernel:
        return grouped_kernel(gated=False, shape=shape)

    def _shape(self, layer: int, num_rows: int) -> TileShape:
        """The shape of the tiles of a call on `num_rows` rows."""
        if len(self.shapes) == 1:
            return self.shapes[0]
        found = self._shape_of.get((layer, num_rows))
        if found is None:
            assert self._num_experts is not None  # or there would be one shape
            rows, w = num_rows * self.top_k / self._num_experts, self.weights[layer]
            found = shape_for(rows, 6 * rows * w.num_local_experts * self.hidden * w.intermediate, self.num_sms)
            if len(self._shape_of) >= MAX_LAYOUTS * len(self.weights):
                self._shape_of.clear()
            self._shape_of[layer, num_rows] = found
        return found

    def with_free_sms(self, num_sms: int) -> HopperExperts:
        other = copy.copy(self)  # the same weights and maps
        other.num_sms, other._shape_of = max(1, self.num_sms - num_sms), {}
        other._leaves_sms = self._leaves_sms or num_sms > 0
        return other

    def new_scratch(self, max_rows: int) -> HopperScratch:
        self.check_max_rows(max_rows)
        return HopperScratch(self, max_rows)

    def warm_up(self, scratch: HopperScratch) -> None:
        """Run every kernel that this scratch may launch, on the current stream, and synchronise."""
        index = index_kernels(self.top_k, self.on_hopper)
        load_all(
            [index.alone, index.count, index.place, *self._gemm_kernels()],
            torch.cuda.current_device() if self.device.index is None else self.device.index,
        )
        wire = WireFormat(self.hidden, self.top_k, self.wire_dtype)
        num_rows = min(1, scratch.max_rows)
        rows = wire.rows(torch.zeros((num_rows, wire.row_bytes), dtype=torch.uint8, device=self.device))
        kinds = {}
        for layer, w in enumerate(self.weights):
            kinds[w.kind] = layer
        for layer in kinds.values():
            rows.ids.fill_(self.weights[layer].first_expert)
            for dtype in self.out_dtypes:
                for padding in (0, 1):  # rows of out on 16-byte boundaries, and not
                    out = torch.empty((num_rows + 1, self.hidden + padding), dtype=dtype, device=self.device)
                    self(layer, rows, out[padding : padding + num_rows, : self.hidden], scratch)
        torch.cuda.synchronize(self.device)

    def _gemm_kernels(self) -> list[Kernel]:
        """All kernels of GEMMs that a call may launch."""
        layers = {w.kind: layer for layer, w in enumerate(self.weights)}.values()
        gate_ups = [self._gate_up_kernel(layer, shape) for layer in layers for shape in self.shapes]
        return [grouped.kernel for grouped in (*gate_ups, *(self._down_kernel(shape) for shape in self.shapes))]

    def __call__(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: HopperScratch) -> None:
        num_rows = len(out)
        out_layout = out.get_device(), out.dtype, out.shape[1:], out.stride(), out.data_ptr() & 15
        # Everything that prepared launches and their checks depend on; the number of rows and their address are not.
        shape = self._shape(layer, num_rows)
        layout = self, layer, shape.rows, rows.layout, out_layout
        call = scratch.calls.get(layout)
        if call is None or not (0 < num_rows == len(rows) <= scratch.max_rows):
            self.check_call(layer, rows, out, scratch.max_rows)
            if num_rows == 0 or self.weights[layer].num_local_experts == 0:
                out.detach().zero_()
                return
            call = self._prepared_call(layer, shape, rows, out, scratch)
            if len(scratch.calls) >= MAX_LAYOUTS * len(self.weights):
                scratch.calls.clear()
            scratch.calls[layout] = call
        call(rows, out, num_rows)

    def most_few_rows(self, layer: int) -> int:
        w = self.weights[layer]
        plain = w.gated and w.gate_up_bias is None and w.down_bias is None and w.num_local_experts
        plain = plain and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (w.gate_up, w.down))
        serves = plain and self.implementation == "hopper" and not self.deterministic
        return few_experts.MOST_ROWS if serves and few_experts.fits(self.hidden, w.intermediate, self.top_k) else 0

    def on_few_rows(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: HopperScratch) -> None:
        w = self.weights[layer]
        of_rows = rows.hidden, rows.ids, rows.weights, w.first_expert
        stream = Stream.current(self.device)
        few_experts.few_experts(stream, *of_rows, w.gate_up, w.down, scratch.a, out, w.gating)

    @torch.no_grad()
    def _prepared_call(
        self, layer: int, shape: TileShape, rows: WireRows, out: torch.Tensor, scratch: HopperScratch
    ) -> PreparedCall:
        weights = self.weights[layer]
        num_local, first_expert = weights.num_local_experts, weights.first_expert
        offsets, positions, tokens = scratch.offsets[:num_local], scratch.positions, scratch.tokens
        index = PackedIndex(
            rows.ids.get_device(),
            rows.ids,
            first_expert,
            num_local,
            scratch.block_counts,
            offsets,
            positions,
            tokens,
            on_hopper=self.on_hopper,
        )
        a = scratch.a[: len(tokens) * weights.intermediate].view(len(tokens), weights.intermediate)
        gate_up = self._pack_gate_up(layer, shape, scratch, rows.hidden, offsets, a)
        down = self._pack_down(layer, shape, scratch, a, offsets)
        how = {"on_hopper": self.on_hopper, "may_start_early": not self._leaves_sms}
        return PreparedCall(weights, index, gate_up, down, scratch.y, positions, rows, out, **how)

    def _pack_gate_up(
        self,
        layer: int,
        shape: TileShape,
        scratch: HopperScratch,
        hidden: torch.Tensor,
        offsets: torch.Tensor,
        a: torch.Tensor,
    ) -> PackedGateUp:
        """a [pairs, I] from the rows scratch.tokens of `hidden`."""
        kernel, maps = (
            self._gate_up_kernel(layer, shape),
            self._maps.data_ptr() + MAP_BYTES * self._first_maps[layer][0],
        )
        bias = self.weights[layer].gate_up_bias
        return packed_wgmma.PackedGateUp(
            a.get_device(), kernel, hidden, scratch.tokens, maps, offsets, bias, a, self.num_sms
        )

    def _pack_down(
        self,
        layer: int,
        shape: TileShape,
        scratch: HopperScratch,
        a: torch.Tensor,
        offsets: torch.Tensor,
    ) -> PackedDown:
        """a times down: scratch.y [pairs, H]."""
        kernel, maps = self._down_kernel(shape), self._maps.data_ptr() + MAP_BYTES * self._first_maps[layer][1]
        a_maps, intermediate = scratch.a_maps[a.shape[1], shape], a.shape[1]
        return packed_wgmma.PackedDown(
            a.get_device(),
            kernel,
            a_maps,
            maps,
            offsets,
            intermediate,
            scratch.y,
            self.num_sms,
            may_start_early=not self._leaves_sms,
        )
