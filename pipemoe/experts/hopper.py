"""Experts on a Hopper GPU: tensor-core kernels that gather rows straight from the wire buffer.

    rows [n] --index--> tokens [pairs] --gate_up_rows (gather, GEMM, activation)--> a [pairs, I]
      for each block of columns:  --down_rows--> y [pairs, block] --combine--> out [n, block]

Nothing is allocated and nothing synchronises the host. The GEMMs run in persistent blocks, one per multiprocessor of num_sms.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pipemoe.errors import ConfigError
from pipemoe.experts.protocol import ExpertsShape, Recordable, column_ranges
from pipemoe.experts.weights import ExpertWeights
from pipemoe.wire import WireFormat
from pipemoe_kernels.combine import combine_rows
from pipemoe_kernels.combine_lanes import combine_lanes, fits
from pipemoe_kernels.grouped_roles import PART_COLUMNS
from pipemoe_kernels.grouped_wgmma import down_rows, gate_up_rows, grouped_kernel
from pipemoe_kernels.index_hopper import MAX_BLOCKS, MAX_EXPERTS, index_kernels, index_local_pairs
from pipemoe_kernels.launch import Stream
from pipemoe_kernels.ring import X_BOXES
from pipemoe_kernels.tensor_map import MAP_BYTES, device_maps, tensor_map

if TYPE_CHECKING:
    from pipemoe.wire import WireRows

CAPABILITY, LEAST_CAPABILITY = (9, 0), (8, 0)


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
        self.positions = empty(max_rows, experts.top_k)
        self.tokens = empty(num_pairs)
        self.offsets = empty(num_local)
        self.block_counts = empty(MAX_BLOCKS * num_local)
        self.a = empty(num_pairs * experts.max_intermediate, dtype=torch.bfloat16)
        self.y = empty(num_pairs, experts.hidden, dtype=torch.bfloat16)
        # A layer's intermediate -> address of the maps of `a` with rows of that length.
        sizes = sorted({w.intermediate for w in experts.weights}) if num_pairs and experts.on_hopper else []
        views = [self.a[: num_pairs * size].view(num_pairs, size) for size in sizes]
        self.maps = device_maps([tensor_map(view, box) for view in views for box in X_BOXES], experts.device)
        step = len(X_BOXES) * MAP_BYTES
        self.a_maps = {size: self.maps.data_ptr() + step * i for i, size in enumerate(sizes)}
        self.num_bytes = sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))


class HopperExperts(ExpertsShape):
    """The experts call on CUDA tensors: only enqueues on torch's current stream. Implementation name "hopper".

    Every kernel sums a row's products in an order that depends on nothing but the sizes of the matrices, so that a row's bits
    depend on the row alone; deterministic adds that the sum over ranks is exact (see pipemoe_kernels.combine).
    num_sms: blocks of the GEMMs; None: one for each multiprocessor.
    """

    implementation = "hopper"
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
    ):
        super().__init__(
            weights, top_k=top_k, hidden=hidden, device=device, dtype=dtype, deterministic=deterministic
        )
        if reason := unsupported(weights, hidden, device, dtype, self.implementation):
            raise ConfigError(reason)
        self.num_sms = num_sms or torch.cuda.get_device_properties(device).multi_processor_count
        self._prepare()

    def _prepare(self) -> None:
        """Make what the GEMMs of each layer need."""
        self._down_kernel = grouped_kernel(gated=False)
        maps = []
        self._layers = []
        for w in self.weights:
            gate_up_kernel = grouped_kernel(gated=w.gated, has_bias=w.gate_up_bias is not None, activation=w.activation)
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

    @torch.no_grad()
    def __call__(
        self, layer: int, rows: WireRows, out: torch.Tensor, scratch: HopperScratch, events: Sequence[Recordable] = ()
    ) -> None:
        self.check_call(layer, rows, out, scratch.max_rows)
        weights = self.weights[layer]
        num_rows, num_local = len(rows), weights.num_local_experts
        if num_rows == 0 or num_local == 0:
            out.zero_()
            for event in events:
                event.record()
            return
        stream = Stream.current(out.device)
        num_pairs, intermediate = num_rows * self.top_k, weights.intermediate
        offsets, positions = scratch.offsets[:num_local], scratch.positions[:num_rows]
        ids, first_expert, tokens = rows.ids, weights.first_expert, scratch.tokens
        counts = scratch.block_counts
        index_local_pairs(stream, ids, first_expert, num_local, counts, offsets, positions, tokens, on_hopper=self.on_hopper)
        a = scratch.a[: num_pairs * intermediate].view(num_pairs, intermediate)
        self._gate_up(stream, layer, scratch, rows, offsets, a)
        for block, columns in enumerate(column_ranges(self.hidden, max(1, len(events)))):
            part = slice(columns.start, columns.stop)
            y, out_part = scratch.y[:num_pairs, part], out[:, part]
            bias = None if weights.down_bias is None else weights.down_bias[:, part]
            self._down(stream, layer, scratch, a, offsets, y, columns.start)
            if fits(len(columns), out_part):
                combine_lanes(stream, y, positions, ids, first_expert, rows.weights, bias, out_part, on_hopper=self.on_hopper)
            else:
                combine_rows(stream, y, positions, ids, first_expert, rows.weights, bias, out_part)
            if events:
                events[block].record()

    def _gate_up(
        self, stream: Stream, layer: int, scratch: HopperScratch, rows: WireRows, offsets: torch.Tensor, a: torch.Tensor
    ) -> None:
        """a [pairs, I] from the rows scratch.tokens of `rows`."""
        kernel, gate_up_map, _ = self._layers[layer]
        maps = self._maps.data_ptr() + MAP_BYTES * gate_up_map
        bias = self.weights[layer].gate_up_bias
        gate_up_rows(stream, kernel, rows.hidden, scratch.tokens, maps, offsets, bias, a, self.num_sms)

    def _down(
        self, stream: Stream, layer: int, scratch: HopperScratch, a: torch.Tensor, offsets: torch.Tensor, y: torch.Tensor, first_column: int
    ) -> None:
        """Columns of a times down, from `first_column` on: y [pairs, columns]."""
        _, _, down_map = self._layers[layer]
        maps = self._maps.data_ptr() + MAP_BYTES * down_map
        a_maps = scratch.a_maps[a.shape[1]]
        down_rows(stream, self._down_kernel, a_maps, maps, offsets, a.shape[1], y, self.num_sms, first_column)
