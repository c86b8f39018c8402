"""Experts on a GPU: grouped GEMMs between Numba CUDA kernels. Implementation name "torch".

    rows --index--> offsets, positions --gather--> x [pairs, H] --grouped_mm--> h [pairs, 2I]
         --activation--> a [pairs, I] --grouped_mm--> y [pairs, H] --combine--> out [n, H]

The host knows only n; the number of local pairs stays on the device. GEMMs therefore get matrices of one of two fixed
heights, and compute the rows below offsets[-1]. One height is the scratch's. The other, if all pairs fit it, is the
largest for which torch picks its tile for few rows. So torch's allocator is asked for the same few sizes again and
again. grouped_mm serves bfloat16 on Hopper and Blackwell. Elsewhere torch would fall back to a loop that synchronises
with the host, so the SIMT kernel takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import grouped_mm

from pipemoe.errors import ConfigError
from pipemoe.experts.protocol import ExpertsShape
from pipemoe.experts.weights import ExpertWeights
from pipemoe.wire import WireFormat
from pipemoe_kernels.activation import activate_rows
from pipemoe_kernels.combine import combine_rows
from pipemoe_kernels.gather import gather_rows, padded_columns
from pipemoe_kernels.gemm.simt import grouped_gemm
from pipemoe_kernels.index.portable import MAX_LOCAL_EXPERTS, index_kernels, index_pairs, num_tiles
from pipemoe_kernels.launch.kernel import Stream

if TYPE_CHECKING:
    from pipemoe.wire import WireRows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPED_MM_MAJORS = (9, 10)  # compute capabilities (major) whose grouped_mm needs no host synchronisation
GROUPED_MM_ALIGNMENT = 8  # columns: it wants rows on 16-byte boundaries
# torch takes a smaller tile if the matrix has at most this many rows per expert (its GroupMM.cu). The order of a sum
# may depend on the tile, so the deterministic mode always stays above.
SMALL_TILE_ROWS_PER_EXPERT = 128


class TorchScratch:
    """Memory of one slot for up to `max_rows` rows. num_bytes includes the most that grouped_mm allocates by itself."""

    def __init__(self, experts: TorchExperts, max_rows: int):
        max_pairs = experts.max_pairs(max_rows)
        if experts.deterministic and max_pairs:
            max_pairs = max(max_pairs, (SMALL_TILE_ROWS_PER_EXPERT + 1) * experts.max_local_experts)
        hidden, intermediate = experts.hidden, experts.max_intermediate
        num_local = experts.max_local_experts

        def empty(*shape: int, dtype: torch.dtype = experts.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=experts.device)

        self.max_rows = max_rows
        self.max_pairs = max_pairs
        self.positions = empty(max_rows, experts.top_k, dtype=torch.int32)
        self.offsets = empty(num_local, dtype=torch.int32)
        self.tile_counts = empty(num_tiles(max_rows * experts.top_k, index_kernels()) * num_local, dtype=torch.int32)
        # Results never read rows that grouped_mm skips; the zeros only keep sanitizers quiet.
        self.x = empty(max_pairs, padded_columns(hidden, experts.dtype)).zero_()
        self.a = empty(max_pairs * intermediate).zero_()
        # grouped_mm returns a new h, freed before it returns a new y. The SIMT path writes h here, and y over x.
        self.h = empty(0 if experts.uses_grouped_mm else max_pairs * 2 * intermediate)
        own = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        transient = max_pairs * (2 * intermediate + hidden) if experts.uses_grouped_mm else 0
        self.transient_bytes = transient * experts.dtype.itemsize
        self.num_bytes = sum(tensor.nbytes for tensor in own) + self.transient_bytes


class TorchExperts(ExpertsShape):
    """The experts call on CUDA tensors: only enqueues on torch's current stream.

    deterministic: a row's products and sums do not depend on other rows, in every kernel here and, as measured, in
    grouped_mm as long as its tile is the same. The result is then summed on the grid (see pipemoe_kernels.combine).
    """

    implementation = "torch"

    def __init__(
        self,
        weights: Sequence[ExpertWeights],
        *,
        top_k: int,
        hidden: int,
        device: torch.device,
        dtype: torch.dtype,
        deterministic: bool = False,
    ):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype}; torch experts take one of {DTYPES}")
        super().__init__(weights, top_k=top_k, hidden=hidden, device=device, dtype=dtype, deterministic=deterministic)
        if self.max_local_experts > MAX_LOCAL_EXPERTS:
            raise ConfigError(
                f"a rank would hold {self.max_local_experts} experts; the index kernels take at most "
                f"{MAX_LOCAL_EXPERTS}: use more ranks"
            )
        aligned = hidden % GROUPED_MM_ALIGNMENT == 0 and all(
            w.intermediate % GROUPED_MM_ALIGNMENT == 0 for w in self.weights
        )
        major, _ = torch.cuda.get_device_capability(device)
        self.uses_grouped_mm = dtype == torch.bfloat16 and aligned and major in GROUPED_MM_MAJORS
        # grouped_mm wants [E_loc, in, out] with "in" adjacent: views made once.
        self._transposed = [(w.gate_up.detach().mT, w.down.detach().mT) for w in self.weights]

    def new_scratch(self, max_rows: int) -> TorchScratch:
        self.check_max_rows(max_rows)
        return TorchScratch(self, max_rows)

    def warm_up(self, scratch: TorchScratch) -> None:
        """Run every kernel that this scratch may launch, on the current stream, and synchronise."""
        wire = WireFormat(self.hidden, self.top_k, self.dtype)
        rows = wire.rows(torch.zeros((scratch.max_rows, wire.row_bytes), dtype=torch.uint8, device=self.device))
        kinds = {}
        for layer, w in enumerate(self.weights):
            kinds[w.kind] = layer
        for layer in kinds.values():
            rows.ids.fill_(-1)
            rows.ids[:1] = self.weights[layer].first_expert
            for dtype in self.out_dtypes:
                out = torch.empty((scratch.max_rows, self.hidden), dtype=dtype, device=self.device)
                self(layer, rows, out, scratch)
                self(layer, rows[:1], out[:1], scratch)
        torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def __call__(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: TorchScratch) -> None:
        self.check_call(layer, rows, out, scratch.max_rows)
        weights = self.weights[layer]
        num_rows, num_local = len(rows), weights.num_local_experts
        if num_rows == 0 or num_local == 0:
            out.zero_()
            return
        stream = Stream.current(rows.buffer.device)
        offsets, positions = scratch.offsets[:num_local], scratch.positions[:num_rows]
        index_pairs(stream, rows.ids, weights.first_expert, num_local, scratch.tile_counts, offsets, positions)
        gather_rows(stream, rows.hidden, positions, scratch.x)
        height = self._gemm_height(num_rows, num_local, scratch)
        a = scratch.a[: height * weights.intermediate].view(height, weights.intermediate)
        if self.uses_grouped_mm:
            gate_up, down = self._transposed[layer]
            h = grouped_mm(scratch.x[:height], gate_up, offs=offsets)
            activate_rows(stream, h, weights.gate_up_bias, offsets, a, weights.gating)
            del h
            y = grouped_mm(a, down, offs=offsets)
        else:
            h = scratch.h[: height * weights.gate_up_rows].view(height, weights.gate_up_rows)
            y = scratch.x.view(-1)[: height * self.hidden].view(height, self.hidden)
            grouped_gemm(stream, scratch.x[:height, : self.hidden], weights.gate_up, offsets, h)
            activate_rows(stream, h, weights.gate_up_bias, offsets, a, weights.gating)
            grouped_gemm(stream, a, weights.down, offsets, y)
        combine_rows(stream, y, positions, rows.ids, weights.first_expert, rows.weights, weights.down_bias, out)

    def _gemm_height(self, num_rows: int, num_local: int, scratch: TorchScratch) -> int:
        """Rows of the matrices that the GEMMs get: at least all pairs of the call."""
        num_pairs = num_rows * self.top_k
        if not self.uses_grouped_mm:
            return num_pairs  # nothing is allocated, and the grid follows the height
        small = SMALL_TILE_ROWS_PER_EXPERT * num_local
        return scratch.max_pairs if self.deterministic or num_pairs > small else min(small, scratch.max_pairs)
