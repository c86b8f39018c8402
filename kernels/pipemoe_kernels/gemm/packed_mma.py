"""A launch of mma.py's grouped GEMM: its checks, and what of it stays the same from call to call."""

from __future__ import annotations

import torch

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.mma import MAX_CUTS, PART_COLUMNS, TILE_COLUMNS, TILE_ROWS, grouped_mma_kernel
from pipemoe_kernels.gemm.raster import MAX_EXPERTS


class PackedMma:
    """out[p] = activation(gate r) * (up r), or activation(w r), r = x[tokens[p]]; w x[p] if tokens and activation are
    None. Ready for x of one layout and any number of pairs for which `out` has room.

    For every place p < offsets[-1] of the sorted order; later rows are neither read nor written. x [n, Kd]
    bfloat16, rows strided on 16-byte boundaries; tokens [pairs] int32; w [E_loc, N, Kd]; offsets
    [E_loc] int32 ends; bias [E_loc, N] or None; out [pairs, N], or [pairs, N / 2] if gated, rows strided on 16-byte
    boundaries.
    """

    def __init__(
        self,
        device_index: int,
        x: torch.Tensor,
        tokens: torch.Tensor | None,
        w: torch.Tensor,
        offsets: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        num_sms: int,
        *,
        gated: bool = False,
        activation: str | Gating | None = None,
    ):
        num_local, num_rows_of_w, depth = w.shape
        num_columns = out.shape[1]
        assert (tokens is None) == (activation is None) and (activation is not None or bias is None)
        assert x.dtype == w.dtype == out.dtype == torch.bfloat16 and x.shape[1] == depth, (x.shape, w.shape)
        assert num_rows_of_w == num_columns * (2 if gated else 1), (w.shape, out.shape)
        assert depth % PART_COLUMNS == 0 and num_columns % PART_COLUMNS == 0, (w.shape, out.shape)
        assert x.stride(1) == out.stride(1) == 1 and w.is_contiguous()
        assert all(t.stride(0) % PART_COLUMNS == 0 for t in (x, out)) and w.data_ptr() % 16 == out.data_ptr() % 16 == 0
        assert offsets.dtype == torch.int32 and len(offsets) == num_local <= MAX_EXPERTS
        assert tokens is None or tokens.dtype == torch.int32
        assert bias is None or (
            bias.dtype == torch.bfloat16 and bias.is_contiguous() and bias.shape == (num_local, num_rows_of_w)
        )
        kernel = grouped_mma_kernel(gated=gated, has_bias=bias is not None, activation=activation)
        self._launch = kernel.pack(
            device_index,
            x,
            x.stride(0) // PART_COLUMNS,
            offsets if tokens is None else tokens,
            w,
            offsets,
            num_local,
            num_columns,
            depth,
            offsets if bias is None else bias,
            out,
            2 * out.stride(0),
        )
        self._x = kernel.index_of("x")
        output_columns = TILE_COLUMNS // 2 if gated else TILE_COLUMNS
        self._slices = -(-num_columns // output_columns) << MAX_CUTS
        self._num_local, self._num_sms = num_local, num_sms

    def __call__(self, stream: int, x: int, num_pairs: int) -> None:
        """Enqueue on a stream's handle, for num_pairs >= 1 pairs and x at that address."""
        assert x % 16 == 0, x
        row_tiles = num_pairs // TILE_ROWS + min(self._num_local, num_pairs)
        self._launch.values[self._x] = x
        self._launch(stream, min(self._num_sms, row_tiles * self._slices))
