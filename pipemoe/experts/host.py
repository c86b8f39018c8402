"""Experts on the host: Numba index, gather, activation and combine around library GEMMs, one local expert at a time.

    rows [n] --index_pairs--> sorted order --gather_rows--> x [tile, H] --mm--> h [tile, 2I] --swiglu--> a [tile, I]
         --mm--> y [pairs, H] float32 --combine_rows--> out [n, H]

Only y and the index grow with the rows of a call; everything else is one tile. All of it is allocated in the scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipemoe.errors import ConfigError
from pipemoe.experts import pairs
from pipemoe.experts.protocol import ExpertsShape
from pipemoe.experts.weights import ExpertWeights
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    from pipemoe.wire import WireRows

TILE_ROWS = 256  # rows of one GEMM: large enough for the library's rate, small enough for the tile to stay in cache
DETERMINISTIC_TILE_ROWS = 16  # every GEMM of the deterministic mode has exactly this many rows
COMBINE_ROWS = 64  # rows of the staging tile for results that are 16-bit or not contiguous
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HostScratch:
    """Memory of one slot: the sorted order of up to `max_rows` rows, their expert results, and one tile of each GEMM."""

    def __init__(self, shape: ExpertsShape, max_rows: int, tile_rows: int):
        max_pairs = shape.max_pairs(max_rows)
        hidden, intermediate, dtype = shape.hidden, shape.max_intermediate, shape.dtype
        self.max_rows = max_rows
        self.positions = np.empty((max_rows, shape.top_k), np.int32)
        self.sorted_tokens = np.empty(max_pairs, np.int32)
        self.offsets = np.empty(shape.max_local_experts + 1, np.int64)
        self.y = torch.empty((max_pairs, hidden), dtype=torch.float32)
        self.x_tile = torch.empty((tile_rows, hidden), dtype=dtype)
        self.h_tile = torch.empty(tile_rows * 2 * intermediate, dtype=torch.float32)
        self.a_tile = torch.empty(tile_rows * intermediate, dtype=torch.float32)
        self.y_tile = torch.empty((tile_rows, hidden), dtype=dtype)
        # 16-bit GEMMs write these; the activation works on float32 copies.
        narrow = 0 if dtype == torch.float32 else tile_rows * intermediate
        self.h_tile_narrow = torch.empty(2 * narrow, dtype=dtype)
        self.a_tile_narrow = torch.empty(narrow, dtype=dtype)
        self.out_tile = torch.empty((COMBINE_ROWS, hidden), dtype=torch.float64 if shape.deterministic else torch.float32)
        arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray | torch.Tensor)]
        self.num_bytes = sum(array.nbytes for array in arrays)


class HostExperts(ExpertsShape):
    """The experts call on CPU tensors; synchronous in the calling thread. Implementation name "host".

    deterministic: GEMMs run in zero-padded tiles of DETERMINISTIC_TILE_ROWS rows, so that the library always sees the same
    shape. A probe at construction checks that the library then treats all rows of a tile alike; if not, tiles have one row.
    """

    implementation = "host"

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
            raise ConfigError(f"dtype is {dtype}; host experts take one of {DTYPES}")
        super().__init__(
            weights, top_k=top_k, hidden=hidden, device=device, dtype=dtype, deterministic=deterministic
        )
        no_bias = np.empty(0, np.float32)
        self._gate_up_biases = [
            [no_bias] * w.num_local_experts if w.gate_up_bias is None else list(w.gate_up_bias.detach().float().numpy())
            for w in self.weights
        ]
        self.tile_rows = TILE_ROWS
        if deterministic:
            self.tile_rows = DETERMINISTIC_TILE_ROWS if self._library_treats_rows_alike() else 1

    def new_scratch(self, max_rows: int) -> HostScratch:
        self.check_max_rows(max_rows)
        return HostScratch(self, max_rows, self.tile_rows)

    def warm_up(self, scratch: HostScratch) -> None:
        num_rows = min(2, scratch.max_rows)
        wire = WireFormat(self.hidden, self.top_k, self.dtype)
        rows = wire.rows(torch.zeros((num_rows, wire.row_bytes), dtype=torch.uint8))
        for layer in range(min(1, len(self.weights))):
            rows.ids.fill_(self.weights[layer].first_expert)
            for dtype in self.out_dtypes:
                self(layer, rows, torch.empty((num_rows, self.hidden), dtype=dtype), scratch)

    @torch.no_grad()
    def __call__(self, layer: int, rows: WireRows, out: torch.Tensor, scratch: HostScratch) -> None:
        self.check_call(layer, rows, out, scratch.max_rows)
        weights = self.weights[layer]
        if weights.num_local_experts == 0:
            out.zero_()
            return
        if len(rows) == 0:
            return
        offsets = scratch.offsets[: weights.num_local_experts + 1]
        pairs.index_pairs(rows.ids.numpy(), weights.first_expert, offsets, scratch.positions, scratch.sorted_tokens)
        # Numba knows no 16-bit floats; a gather only moves bits.
        values = rows.buffer.view(torch.float32 if self.dtype == torch.float32 else torch.int16).numpy()
        for expert in range(weights.num_local_experts):
            for start in range(offsets[expert], offsets[expert + 1], self.tile_rows):
                stop = min(start + self.tile_rows, int(offsets[expert + 1]))
                self._run_tile(layer, expert, values, start, stop, scratch)
        self._combine(rows, out, scratch)

    def _run_tile(self, layer: int, expert: int, values: np.ndarray, start: int, stop: int, s: HostScratch) -> None:
        """y[start:stop] = down(silu(gate(x)) * up(x)) for the sorted pairs [start, stop) of one local expert."""
        weights = self.weights[layer]
        num_rows = self.tile_rows if self.deterministic else stop - start
        intermediate = weights.intermediate
        x = s.x_tile[:num_rows]
        bits = x if self.dtype == torch.float32 else x.view(torch.int16)
        pairs.gather_rows(values, s.sorted_tokens, start, stop, bits.numpy())
        h = s.h_tile[: num_rows * 2 * intermediate].view(num_rows, 2 * intermediate)
        a = s.a_tile[: num_rows * intermediate].view(num_rows, intermediate)
        bias = self._gate_up_biases[layer][expert]
        if self.dtype == torch.float32:
            torch.mm(x, weights.gate_up[expert].t(), out=h)
            pairs.swiglu_rows(h.numpy(), bias, a.numpy())
        else:
            narrow = s.h_tile_narrow[: num_rows * 2 * intermediate].view(num_rows, 2 * intermediate)
            torch.mm(x, weights.gate_up[expert].t(), out=narrow)
            pairs.swiglu_rows(h.copy_(narrow).numpy(), bias, a.numpy())
            a = s.a_tile_narrow[: num_rows * intermediate].view(num_rows, intermediate).copy_(a)
        y = s.y[start:stop]
        if self.dtype == torch.float32 and not self.deterministic:
            torch.mm(a, weights.down[expert].t(), out=y)
        else:
            y.copy_(torch.mm(a, weights.down[expert].t(), out=s.y_tile[:num_rows])[: stop - start])
        if weights.down_bias is not None:
            y.add_(weights.down_bias[expert])

    def _combine(self, rows: WireRows, out: torch.Tensor, s: HostScratch) -> None:
        y, weights = s.y.numpy(), rows.weights.numpy()
        combine = pairs.combine_rows_on_grid if self.deterministic else pairs.combine_rows
        if out.dtype == s.out_tile.dtype and out.is_contiguous():
            combine(y, s.positions, weights, 0, out.numpy())
            return
        for start in range(0, len(rows), COMBINE_ROWS):
            part = out[start : start + COMBINE_ROWS]
            tile = s.out_tile[: len(part)]
            combine(y, s.positions, weights, start, tile.numpy())
            part.copy_(tile)

    @torch.no_grad()
    def _library_treats_rows_alike(self) -> bool:
        """Whether one row gives the same bits at every place of a tile, for the shapes of the first layer with experts."""
        weights = next((w for w in self.weights if w.num_local_experts), None)
        if weights is None:
            return True
        generator = torch.Generator().manual_seed(0)
        for matrix in (weights.gate_up[0], weights.down[0]):
            row = torch.randn(1, matrix.shape[1], generator=generator).to(self.dtype)
            results = []
            for place in range(DETERMINISTIC_TILE_ROWS):
                tile = torch.zeros(DETERMINISTIC_TILE_ROWS, matrix.shape[1], dtype=self.dtype)
                tile[place] = row
                results.append(torch.mm(tile, matrix.t())[place])
            if not all(torch.equal(result, results[0]) for result in results):
                return False
        return True
