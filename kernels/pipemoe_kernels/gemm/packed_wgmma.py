"""Launches of wgmma.py's grouped GEMMs: their checks, and what of them stays the same from call to call."""

from __future__ import annotations

import torch

from pipemoe_kernels.gemm.raster import MAX_EXPERTS
from pipemoe_kernels.gemm.roles import PART_COLUMNS
from pipemoe_kernels.gemm.wgmma import GroupedKernel
from pipemoe_kernels.launch.kernel import Stream


class PackedGateUp:
    """gate_up_rows, ready for hidden values of one layout and any number of pairs for which `a` has room."""

    def __init__(
        self,
        device_index: int,
        kernel: GroupedKernel,
        hidden: torch.Tensor,
        tokens: torch.Tensor,
        gate_up_maps: int,
        offsets: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        num_sms: int,
    ):
        intermediate, num_local = a.shape[1], len(offsets)
        w_rows = 2 * intermediate if kernel.gated else intermediate
        row_bytes = hidden.stride(0) * 2
        assert hidden.dtype == a.dtype == torch.bfloat16
        assert hidden.shape[1] % PART_COLUMNS == 0 and intermediate % PART_COLUMNS == 0, (hidden.shape, a.shape)
        assert hidden.stride(1) == 1 and row_bytes % 16 == 0, hidden.stride()
        assert a.is_contiguous() and a.data_ptr() % 16 == 0
        assert tokens.dtype == offsets.dtype == torch.int32 and num_local <= MAX_EXPERTS
        assert bias is None or (
            bias.dtype == torch.bfloat16 and bias.is_contiguous() and bias.shape == (num_local, w_rows)
        )
        self._launch = kernel.kernel.pack(
            device_index,
            hidden,
            row_bytes // 16,
            tokens,
            gate_up_maps,
            offsets,
            num_local,
            intermediate,
            hidden.shape[1],
            offsets if bias is None else bias,
            a,
            2 * intermediate,
        )
        self._x = kernel.kernel.index_of("x")
        self._num_blocks = kernel.num_blocks(num_local, intermediate, num_sms)

    def __call__(self, stream: int, hidden: int, num_pairs: int) -> None:
        """Enqueue on a stream's handle, for rows at the address `hidden` that have num_pairs >= 1 pairs in all."""
        assert hidden % 16 == 0, hidden
        self._launch.values[self._x] = hidden
        self._launch(stream, self._num_blocks(num_pairs))


def gate_up_rows(
    stream: Stream,
    kernel: GroupedKernel,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    gate_up_maps: int,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    num_sms: int,
) -> None:
    """a[p] = activation(gate x) * (up x), x = hidden[tokens[p]], for every place p < offsets[-1] of the sorted order.

    hidden [n, H] bfloat16, rows strided on 16-byte boundaries; tokens [pairs] int32; gate_up_maps: address of the
    tensor maps of [E_loc, 2I, H] with boxes of the kernel's w_boxes; offsets [E_loc] int32 ends; bias [E_loc, 2I] or
    None; a [pairs, I]. A kernel that is not gated computes activation(x w^T); 2I is then I.
    """
    gate_up = PackedGateUp(stream.device_index, kernel, hidden, tokens, gate_up_maps, offsets, bias, a, num_sms)
    gate_up(stream.handle, hidden.data_ptr(), len(a))


class PackedDown:
    """down_rows, ready for any number of pairs for which `y` has room."""

    def __init__(
        self,
        device_index: int,
        kernel: GroupedKernel,
        a_maps: int,
        down_maps: int,
        offsets: torch.Tensor,
        intermediate: int,
        y: torch.Tensor,
        num_sms: int,
        *,
        may_start_early: bool = True,
    ):
        num_columns, num_local = y.shape[1], len(offsets)
        assert y.dtype == torch.bfloat16 and y.is_contiguous() and y.data_ptr() % 16 == 0
        assert num_columns % PART_COLUMNS == 0 and intermediate % PART_COLUMNS == 0, (num_columns, intermediate)
        assert offsets.dtype == torch.int32 and num_local <= MAX_EXPERTS
        self._launch = kernel.kernel.pack(
            device_index,
            a_maps,
            0,
            offsets,
            down_maps,
            offsets,
            num_local,
            num_columns,
            intermediate,
            offsets,
            y,
            2 * num_columns,
            may_start_early=may_start_early,
        )
        self._num_blocks = kernel.num_blocks(num_local, num_columns, num_sms)

    def __call__(self, stream: int, num_pairs: int) -> None:
        """Enqueue on a stream's handle, for num_pairs >= 1 pairs."""
        self._launch(stream, self._num_blocks(num_pairs))


def down_rows(
    stream: Stream,
    kernel: GroupedKernel,
    a_maps: int,
    down_maps: int,
    offsets: torch.Tensor,
    intermediate: int,
    y: torch.Tensor,
    num_sms: int,
) -> None:
    """y[p] = down a[p] for every place p < offsets[-1] of the sorted order.

    a_maps: address of the tensor maps of a [pairs, I] with boxes of the kernel's shape.x_boxes; down_maps: of [E_loc,
    H, I] with boxes of the kernel's w_boxes; offsets [E_loc] int32 ends; y [pairs, H].
    """
    PackedDown(stream.device_index, kernel, a_maps, down_maps, offsets, intermediate, y, num_sms)(stream.handle, len(y))
