"""Experts on the host: Numba index, gather, activation and combine around library GEMMs, one local expert at a time.

    rows [n] --index_pairs--> sorted order --gather_rows--> x [tile, H] --mm--> h [tile, 2I] --activation--> a [tile, I]
         --mm--> y [pairs, H] --combine_rows--> out [n, H]

All arithmetic is float32. 16-bit weights are widened one expert at a time, but where the CPU multiplies bfloat16
itself: there GEMMs of large experts take them as they are, and h and y are rounded to bfloat16. Only y and the index
grow with max_rows; all of it is allocated in the scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipemoe.addresses import Arguments, Call
from pipemoe.errors import ConfigError
from pipemoe.experts import pairs
from pipemoe.experts.protocol import ExpertsShape
from pipemoe.experts.sgemm import sgemm_address
from pipemoe.experts.weights import ExpertWeights
from pipemoe.wire import WireFormat
from pipemoe_kernels.gating import ACTIVATIONS

if TYPE_CHECKING:
    from pipemoe.wire import ScatteredRows, WireRows

TILE_ROWS = 256  # of one GEMM: large enough for the library's full rate, small enough for the cache
DETERMINISTIC_TILE_ROWS = 16  # every GEMM of the deterministic mode has exactly this many rows
COMBINE_ROWS = 64  # rows of the staging tile for results that are 16-bit or not contiguous
# Values of a matrix from which its bfloat16 product is faster than widening it. 128 x 256: a call takes 60 us, widening
# and a float32 product 35.
LARGE_WEIGHTS = 1 << 18
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def multiplies_bfloat16() -> bool:
    """Has this CPU instructions for it, which torch's library uses? EPYC 9004, 8 rows, 1536 x 2048: 740 us for 1590."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(is_there is not None and is_there() for is_there in known)


class HostScratch:
    """Memory of one slot: the sorted order and expert results of up to `max_rows` rows, and one tile of each GEMM."""

    def __init__(self, shape: ExpertsShape, max_rows: int, tile_rows: int, narrow_products: bool = False):
        """narrow_products: GEMMs take 16-bit values, so that nothing is widened for them but their results."""
        max_pairs = shape.max_pairs(max_rows)
        hidden, intermediate = shape.hidden, shape.max_intermediate
        out_dtype = torch.float64 if shape.deterministic else torch.float32
        is_narrow = shape.dtype != torch.float32
        widened, narrow_rows = (
            (0 if narrow_products else is_narrow * intermediate * hidden),
            narrow_products * tile_rows,
        )
        self.max_rows = max_rows

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cpu")

        self.positions = np.empty((max_rows, shape.top_k), np.int32)
        self.sources = np.empty(max_pairs, np.int64)
        self.rows = np.empty((max_rows, 2), np.int64)
        self.offsets = np.empty(shape.max_local_experts + 1, np.int64)
        self.y = empty(max_pairs, hidden).zero_()  # touches every page, so that no step is the first to
        self.x_tile = empty(tile_rows, hidden)
        self.x_tile_narrow = empty(is_narrow * tile_rows, hidden, dtype=shape.dtype)
        self.h_tile_narrow = empty(narrow_rows * 2 * intermediate, dtype=shape.dtype)
        self.a_tile_narrow = empty(narrow_rows * intermediate, dtype=shape.dtype)
        self.y_tile_narrow = empty(narrow_rows, hidden, dtype=shape.dtype)
        self.h_tile = empty(tile_rows * 2 * intermediate)
        self.a_tile = empty(tile_rows * intermediate)
        self.y_tile = empty(tile_rows if shape.deterministic else 0, hidden)
        self.out_tile = empty(COMBINE_ROWS, hidden, dtype=out_dtype)
        self.gate_up = empty(2 * widened)
        self.down = empty(widened)
        arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray | torch.Tensor)]
        self.num_bytes = sum(array.nbytes for array in arrays)
        self.transient_bytes = 0
        self.arguments = Arguments(
            pairs.SCRATCH,
            offsets=self.offsets,
            sources=self.sources,
            positions=self.positions,
            rows=self.rows,
            x_tile=self.x_tile,
            h_tile=self.h_tile,
            a_tile=self.a_tile,
            y_tile=self.y_tile,
            y=self.y,
        )


class HostExperts(ExpertsShape):
    """The experts call on CPU tensors; synchronous in the calling thread. Implementation name "host".

    deterministic: GEMMs run in zero-padded tiles of DETERMINISTIC_TILE_ROWS rows, so the library always sees one shape.
    A probe at construction checks that the library then treats all rows of a tile alike; if not, tiles have one row.
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
        super().__init__(weights, top_k=top_k, hidden=hidden, device=device, dtype=dtype, deterministic=deterministic)
        no_bias = np.empty(0, np.float32)
        self._gate_up_biases = [
            [no_bias] * w.num_local_experts if w.gate_up_bias is None else list(w.gate_up_bias.detach().float().numpy())
            for w in self.weights
        ]
        self._forms = [
            (ACTIVATIONS.index(w.activation), np.inf if w.limit is None else w.limit, w.alpha, w.up_offset)
            for w in self.weights
        ]
        self._addresses, self._biases = self._of_compiled()
        self._of_layers: list[Arguments] | None = None  # made when they are first asked for
        is_large = self.max_intermediate * hidden >= LARGE_WEIGHTS
        self._narrow_products = dtype == torch.bfloat16 and is_large and not deterministic and multiplies_bfloat16()
        self.tile_rows = TILE_ROWS
        if deterministic:
            self.tile_rows = DETERMINISTIC_TILE_ROWS if self._library_treats_rows_alike() else 1

    def _of_compiled(self) -> tuple[list, list]:
        """Per layer, the addresses of the experts' matrices and their biases, for `compute_experts`; nothing if it
        cannot take them.
        """
        tensors = [t for w in self.weights for t in (w.gate_up, w.down)]
        if self.dtype != torch.float32 or not sgemm_address() or not all(t.is_contiguous() for t in tensors):
            return [], []

        def addresses(matrices: torch.Tensor) -> np.ndarray:
            return matrices.data_ptr() + matrices.stride(0) * 4 * np.arange(len(matrices), dtype=np.int64)

        def bias(values: torch.Tensor | None, num_experts: int) -> np.ndarray:
            if values is None:
                return np.empty((num_experts, 0), np.float32)
            return np.ascontiguousarray(values.detach().float().numpy())

        return (
            [(addresses(w.gate_up), addresses(w.down)) for w in self.weights],
            [(bias(w.gate_up_bias, len(w.gate_up)), bias(w.down_bias, len(w.down))) for w in self.weights],
        )

    def _arguments_of_layer(self, layer: int) -> Arguments:
        weights, (activation, limit, alpha, up_offset) = self.weights[layer], self._forms[layer]
        return Arguments(
            pairs.LAYER,
            gate_up=self._addresses[layer][0],
            down=self._addresses[layer][1],
            gate_up_bias=self._biases[layer][0],
            down_bias=self._biases[layer][1],
            sgemm=sgemm_address(),
            first_expert=weights.first_expert,
            tile_rows=self.tile_rows,
            whole_tiles=self.deterministic,
            width=weights.gate_up.shape[1],
            intermediate=weights.intermediate,
            activation=activation,
            limit=float(limit),
            alpha=float(alpha),
            up_offset=float(up_offset),
        )

    def prepared(self, rows: ScatteredRows, out: torch.Tensor, scratch: HostScratch) -> list[Call] | None:
        """Calls of compiled code that do what a call with these arguments does, of each layer; None if there are none
        for them. Arguments: see __call__. They are looked at now, and written to by each call.
        """
        is_plain = out.dtype == scratch.out_tile.dtype and out.is_contiguous()
        if not self._addresses or not is_plain or not all(w.num_local_experts for w in self.weights):
            return None
        if self._of_layers is None:
            self._of_layers = [self._arguments_of_layer(layer) for layer in range(len(self.weights))]
        self.check_call(0, rows, out, scratch.max_rows)
        of_wave = Arguments(pairs.WAVE, pieces=rows.places, stride=rows.stride, ranges=rows.ranges, out=out)
        calls = []
        for of_layer in self._of_layers:
            scratch_at = scratch.arguments.address
            words = Arguments(pairs.CALL, layer=of_layer.address, wave=of_wave.address, scratch=scratch_at)
            call = words.of(pairs.call_experts)
            calls.append(call._replace(kept=(words, of_wave, scratch, self)))
        return calls

    def new_scratch(self, max_rows: int) -> HostScratch:
        self.check_max_rows(max_rows)
        return HostScratch(self, max_rows, self.tile_rows, self._narrow_products)

    def warm_up(self, scratch: HostScratch) -> None:
        pairs.compile_all(self.deterministic)  # also where the first layer has no expert here
        num_rows = min(2, scratch.max_rows)
        wire = WireFormat(self.hidden, self.top_k, self.dtype)
        rows = wire.rows(torch.zeros((num_rows, wire.row_bytes), dtype=torch.uint8, device="cpu"))
        for layer in range(min(1, len(self.weights))):
            rows.ids.fill_(self.weights[layer].first_expert)
            for dtype in self.out_dtypes:
                self(layer, rows, torch.empty((num_rows, self.hidden), dtype=dtype, device="cpu"), scratch)

    @torch.no_grad()
    def __call__(self, layer: int, rows: WireRows | ScatteredRows, out: torch.Tensor, scratch: HostScratch) -> None:
        """Only rows that lie in a piece are written."""
        self.check_call(layer, rows, out, scratch.max_rows)
        weights = self.weights[layer]
        if weights.num_local_experts == 0:
            out.zero_()
            return
        if len(rows) == 0:
            return
        offsets = scratch.offsets[: weights.num_local_experts + 1]
        pairs.index_pairs(
            rows.places, rows.stride, weights.first_expert, offsets, scratch.positions, scratch.sources, scratch.rows
        )
        if self._addresses:
            self._compute_compiled(layer, offsets, scratch)
        else:
            self._compute_by_torch(layer, offsets, scratch)
        self._combine(rows, out, scratch)

    def _compute_compiled(self, layer: int, offsets: np.ndarray, s: HostScratch) -> None:
        """The experts' results for all sorted pairs, in one call."""
        weights, rows = self.weights[layer], len(s.x_tile)
        width = weights.gate_up.shape[1]
        pairs.compute_experts(
            sgemm_address(),
            *self._addresses[layer],
            *self._biases[layer],
            offsets,
            s.sources,
            self.tile_rows,
            self.deterministic,
            *self._forms[layer],
            s.x_tile.numpy(),
            s.h_tile.numpy()[: rows * width],
            s.a_tile.numpy()[: rows * weights.intermediate],
            s.y_tile.numpy(),
            s.y.numpy(),
        )

    def _compute_by_torch(self, layer: int, offsets: np.ndarray, scratch: HostScratch) -> None:
        """The same, a call of torch for each GEMM: where weights are narrow, or torch's library shows no sgemm."""
        weights = self.weights[layer]
        for expert in range(weights.num_local_experts):
            begin, end = int(offsets[expert]), int(offsets[expert + 1])
            if begin == end:
                continue
            gate_up, down = weights.gate_up[expert], weights.down[expert]
            if not self._narrow_products:
                gate_up, down = self._float32_weights(weights, expert, scratch)
            for start in range(begin, end, self.tile_rows):
                stop = min(start + self.tile_rows, end)
                a = self._activations(layer, gate_up, self._gate_up_biases[layer][expert], start, stop, scratch)
                y = scratch.y[start:stop]
                if self._narrow_products:
                    narrow = scratch.a_tile_narrow[: a.numel()].view(a.shape).copy_(a)
                    y.copy_(torch.mm(narrow, down.t(), out=scratch.y_tile_narrow[: len(y)]))
                elif self.deterministic:
                    y.copy_(torch.mm(a, down.t(), out=scratch.y_tile)[: stop - start])
                else:
                    torch.mm(a, down.t(), out=y)
            if weights.down_bias is not None:
                scratch.y[begin:end].add_(weights.down_bias[expert])

    def _float32_weights(
        self, weights: ExpertWeights, expert: int, s: HostScratch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [2I or I, H] and down [H, I] of one local expert, widened into the scratch if they are narrow."""
        gate_up, down = weights.gate_up[expert], weights.down[expert]
        if self.dtype == torch.float32:
            return gate_up, down
        return (
            s.gate_up[: gate_up.numel()].view(gate_up.shape).copy_(gate_up),
            s.down[: down.numel()].view(down.shape).copy_(down),
        )

    def _activations(
        self,
        layer: int,
        gate_up: torch.Tensor,
        bias: np.ndarray,
        start: int,
        stop: int,
        s: HostScratch,
    ) -> torch.Tensor:
        """activation(gate(x)) * up(x) [rows of the tile, I] for the sorted pairs [start, stop) of one expert."""
        weights, num_rows = self.weights[layer], self.tile_rows if self.deterministic else stop - start
        width = gate_up.shape[0]
        x = s.x_tile[:num_rows]
        if self.dtype == torch.float32:
            pairs.gather_rows(s.sources, start, stop, x.numpy())
        else:
            narrow = s.x_tile_narrow[:num_rows]
            pairs.gather_narrow_rows(s.sources, start, stop, narrow.view(torch.int16).numpy())
            x = narrow if self._narrow_products else x.copy_(narrow)
        h = s.h_tile[: num_rows * width].view(num_rows, width)
        if self._narrow_products:
            h.copy_(torch.mm(x, gate_up.t(), out=s.h_tile_narrow[: num_rows * width].view(num_rows, width)))
        else:
            torch.mm(x, gate_up.t(), out=h)
        a = s.a_tile[: num_rows * weights.intermediate].view(num_rows, weights.intermediate)
        pairs.activate_rows(h.numpy(), bias, *self._forms[layer], a.numpy())
        return a

    def _combine(self, rows: WireRows | ScatteredRows, out: torch.Tensor, s: HostScratch) -> None:
        y = s.y.numpy()
        combine = pairs.combine_rows_on_grid if self.deterministic else pairs.combine_rows
        if out.dtype == s.out_tile.dtype and out.is_contiguous():
            combine(y, s.positions, s.rows, rows.ranges, 0, out.numpy())
            return
        for first, stop in rows.ranges.tolist():
            for start in range(first, stop, COMBINE_ROWS):
                tile = s.out_tile[: stop - start]
                of_tile = np.array([[start, start + len(tile)]], np.int64)
                combine(y, s.positions, s.rows, of_tile, start, tile.numpy())
                out[start : start + len(tile)].copy_(tile)

    @torch.no_grad()
    def _library_treats_rows_alike(self) -> bool:
        """Does a row give the same bits at every place of a tile? Tried with the first layer that has experts."""
        weights = next((w for w in self.weights if w.num_local_experts), None)
        if weights is None:
            return True
        generator = torch.Generator("cpu").manual_seed(0)
        for matrix in (weights.gate_up[0], weights.down[0]):
            matrix = matrix.float()
            row = torch.randn(1, matrix.shape[1], generator=generator, dtype=torch.float32, device="cpu")
            results = []
            for place in range(DETERMINISTIC_TILE_ROWS):
                tile = torch.zeros(DETERMINISTIC_TILE_ROWS, matrix.shape[1], dtype=torch.float32, device="cpu")
                tile[place] = row
                results.append(torch.mm(tile, matrix.t())[place])
            if not all(torch.equal(result, results[0]) for result in results):
                return False
        return True
