"""Experts on a Hopper GPU: tensor-core kernels that gather rows straight from the wire buffer.

    rows [n] --index--> tokens [pairs] --gate_up_rows (gather, GEMM, activation)--> a [pairs, I]
      for each block of columns:  --down_rows--> y [pairs, block] --combine--> out [n, block]

Nothing is allocated and nothing synchronises the host; launches are packed at a layer's first call with a scratch and a layout of rows
and out (prepared_call.py). The GEMMs run in persistent blocks, one per multiprocessor of num_sms.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import ConfigError
from pipemoe.experts.prepared_call import ColumnBlock, PackedDown, PackedGateUp, PreparedCall
from pipemoe.experts.protocol import ExpertsShape, Recordable, column_ranges
from pipemoe.experts.weights import ExpertWeights
from pipemoe.wire import WireFormat
from pipemoe_kernels import grouped_wgmma
from pipemoe_kernels.grouped_roles import PART_COLUMNS
from pipemoe_kernels.grouped_wgmma import grouped_kernel
from pipemoe_kernels.index_hopper import MAX_BLOCKS, MAX_EXPERTS, PackedIndex, index_kernels
from pipemoe_kernels.tensor_map import MAP_BYTES, device_maps, tensor_map
from pipemoe_kernels.tile_shape import DEFAULT_ROWS, SHAPES

if TYPE_CHECKING:
    from pipemoe.wire import WireRows

CAPABILITY, LEAST_CAPABILITY = (9, 0), (8, 0)
MAX_LAYOUTS = 64  # of a layer's calls that a scratch keeps ready; more are of a caller whose tensors have no steady layout


def unsupported(
    weights: Sequence[ExpertWeights], hidden: int, device: torch.device, dtype: torch.dtype, implementation: str = "hopper"
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
        # A layer's intermediate -> address of the maps of `a` with rows of that length.
        sizes = sorted({w.intermediate for w in experts.weights}) if num_pairs and experts.on_hopper else []
        boxes = experts.shape.x_boxes
        views = [self.a[: num_pairs * size].view(num_pairs, size) for size in sizes]
        self.maps = device_maps([tensor_map(view, box) for view in views for box in boxes], experts.device)
        step = len(boxes) * MAP_BYTES
        self.a_maps = {size: self.maps.data_ptr() + step * i for i, size in enumerate(sizes)}
        self.num_bytes = sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


class HopperExperts(ExpertsShape):
    """The experts call on CUDA tensors: only enqueues on torch's current stream. Implementation name "hopper".

    Every kernel sums a row's products in an order that depends on nothing but the sizes of the matrices, so that a row's bits
    depend on the row alone; deterministic adds that the sum over ranks is exact (see pipemoe_kernels.combine).
    num_sms: blocks of the GEMMs; None: one for each multiprocessor. tile_rows: of the bfloat16
    GEMMs' tiles, of tile_shape.SHAPES.
    """

    implementation = "hopper"
    sliced_permille = 350  # the down projection is a third of the arithmetic; and the sums
    supports_arrivals = True
    on_hopper = True  # whether kernels may use what only Hopper has

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
        tile_rows: int = DEFAULT_ROWS,
    ):
        super().__init__(
            weights, top_k=top_k, hidden=hidden, device=device, dtype=dtype, deterministic=deterministic
        )
        if reason := unsupported(weights, hidden, device, dtype, self.implementation):
            raise ConfigError(reason)
        self.num_sms = num_sms or torch.cuda.get_device_properties(device).multi_processor_count
        self.shape = SHAPES[tile_rows]
        self._prepare()

    def _prepare(self) -> None:
        """Make what the GEMMs of each layer need."""
        self._down_kernel = grouped_kernel(gated=False, shape=self.shape)
        maps = []
        self._layers = []
        for w in self.weights:
            gate_up_kernel = grouped_kernel(
                gated=w.gated, has_bias=w.gate_up_bias is not None, activation=w.activation, shape=self.shape
            )
            first = len(maps)
            if w.num_local_experts:
                maps += [tensor_map(w.gate_up.detach(), box) for box in gate_up_kernel.w_boxes]
                maps += [tensor_map(w.down.detach(), box) for box in self._down_kernel.w_boxes]
            self._layers.append((gate_up_kernel, first, first + len(gate_up_kernel.w_boxes)))
        self._maps = device_maps(maps, self.device)

    def leaving(self, num_sms: int) -> HopperExperts:
        other = copy.copy(self)  # the same weights and maps
        other.num_sms = max(1, self.num_sms - num_sms)
        return other

    def new_scratch(self, max_rows: int) -> HopperScratch:
        self.check_max_rows(max_rows)
        return HopperScratch(self, max_rows)

    def warm_up(self, scratch: HopperScratch, column_blocks: Sequence[int] = (1,)) -> None:
        """Run every kernel that this scratch may launch, on the current stream, and synchronise."""
        index = index_kernels(self.top_k, self.on_hopper)
        for kernel in (index.alone, index.count, index.place):
            kernel.load(torch.cuda.current_device() if self.device.index is None else self.device.index)
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
                    for count in column_blocks:
                        events = [torch.cuda.Event() for _ in range(count)]
                        self(layer, rows, out[padding : padding + num_rows, : self.hidden], scratch, events)
        torch.cuda.synchronize(self.device)

    def __call__(
        self, layer: int, rows: WireRows, out: torch.Tensor | Sequence[torch.Tensor], scratch: HopperScratch, events: Sequence[Recordable] = ()
    ) -> None:
        hidden, ids, weights = rows.hidden, rows.ids, rows.weights
        hidden_shape, ids_shape, weights_shape = hidden.shape, ids.shape, weights.shape
        num_rows, out_layout = _layout_of_out(out)
        # All that the prepared launches, and the checks at their making, depend on; not how many rows there are, nor where.
        layout = (
            *(self, layer, len(events), hidden.get_device(), out_layout),
            *(hidden.dtype, hidden_shape[1:], hidden.stride(), ids.dtype, ids_shape[1:], ids.stride()),
            *(weights.dtype, weights_shape[1:], weights.stride()),
        )
        call = scratch.calls.get(layout)
        if call is None or not (0 < num_rows == hidden_shape[0] == ids_shape[0] == weights_shape[0] <= scratch.max_rows):
            parts = self.check_call(layer, rows, out, scratch.max_rows, max(1, len(events)))
            if num_rows == 0 or self.weights[layer].num_local_experts == 0:
                self.nothing_local(parts, events)
                return
            call = self._prepared_call(layer, rows, parts, scratch)
            if len(scratch.calls) >= MAX_LAYOUTS * len(self.weights):
                scratch.calls.clear()
            scratch.calls[layout] = call
        call(rows, out, num_rows, events)

    @torch.no_grad()
    def _prepared_call(
        self, layer: int, rows: WireRows, parts: Sequence[torch.Tensor], scratch: HopperScratch
    ) -> PreparedCall:
        """parts: out's blocks of columns."""
        weights = self.weights[layer]
        num_local, first_expert = weights.num_local_experts, weights.first_expert
        offsets, positions, tokens = scratch.offsets[:num_local], scratch.positions, scratch.tokens
        index = PackedIndex(
            *(rows.ids.get_device(), rows.ids, first_expert, num_local, scratch.block_counts, offsets, positions, tokens),
            on_hopper=self.on_hopper,
        )
        a = scratch.a[: len(tokens) * weights.intermediate].view(len(tokens), weights.intermediate)
        gate_up = self._pack_gate_up(layer, scratch, rows.hidden, offsets, a)
        blocks = []
        for columns in column_ranges(self.hidden, len(parts)):
            part = slice(columns.start, columns.stop)
            bias = None if weights.down_bias is None else weights.down_bias[:, part]
            down = self._pack_down(layer, scratch, a, offsets, scratch.y[:, part], columns.start)
            blocks.append(ColumnBlock(columns, down, scratch.y[:, part], bias))
        return PreparedCall(weights, index, gate_up, blocks, positions, rows, parts, on_hopper=self.on_hopper)

    def _pack_gate_up(
        self, layer: int, scratch: HopperScratch, hidden: torch.Tensor, offsets: torch.Tensor, a: torch.Tensor
    ) -> PackedGateUp:
        """a [pairs, I] from the rows scratch.tokens of `hidden`."""
        kernel, gate_up_map, _ = self._layers[layer]
        maps = self._maps.data_ptr() + MAP_BYTES * gate_up_map
        bias = self.weights[layer].gate_up_bias
        return grouped_wgmma.PackedGateUp(a.get_device(), kernel, hidden, scratch.tokens, maps, offsets, bias, a, self.num_sms)

    def _pack_down(
        self, layer: int, scratch: HopperScratch, a: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor, first_column: int
    ) -> PackedDown | None:
        """Columns of a times down, from `first_column` on: y [pairs, columns]; None if an earlier block's gives them too."""
        _, _, down_map = self._layers[layer]
        maps = self._maps.data_ptr() + MAP_BYTES * down_map
        a_maps, intermediate = scratch.a_maps[a.shape[1]], a.shape[1]
        return grouped_wgmma.PackedDown(
            y.get_device(), self._down_kernel, a_maps, maps, offsets, intermediate, y, self.num_sms, first_column
        )


def _layout_of_out(out: torch.Tensor | Sequence[torch.Tensor]) -> tuple[int, tuple[object, ...]]:
    """Number of rows (-1: blocks differ), and what else a prepared call depends on."""
    if isinstance(out, torch.Tensor):
        shape = out.shape
        return shape[0], (out.get_device(), out.dtype, shape[1:], out.stride(), out.data_ptr() & 15)
    layouts = [_layout_of_out(block) for block in out]
    counts = {num_rows for num_rows, _ in layouts}
    return counts.pop() if len(counts) == 1 else -1, tuple(layout for _, layout in layouts)
