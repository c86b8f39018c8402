"""Tensor maps: how the bulk copy engine finds boxes of a matrix in device memory.

A map is 128 bytes that the driver encodes on the host; kernels take the address of a copy in device memory.
"""

from __future__ import annotations

import torch

from pipemoe_kernels.launch import driver

MAP_BYTES = 128
BOX_BYTES = 128  # of a swizzled row
ELEMENTS = {torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "uint8"}
MAX_BOX_ROWS = 256


def tensor_map(matrix: torch.Tensor, box_rows: int) -> bytes:
    """The map of bfloat16 or e4m3 `matrix` [rows, columns] or [experts, rows, columns].

    Columns are adjacent, rows on 16-byte boundaries. A box is BOX_BYTES x `box_rows` of one expert, swizzled by 128
    bytes in shared memory; outside the matrix it is zero.
    """
    assert matrix.dtype in ELEMENTS and matrix.dim() in (2, 3), (matrix.dtype, matrix.shape)
    assert matrix.stride(-1) == 1 and 1 <= box_rows <= MAX_BOX_ROWS, (matrix.stride(), box_rows)
    size = matrix.dtype.itemsize
    strides = [size * stride for stride in reversed(matrix.stride()[:-1])]
    assert matrix.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides), strides
    box = [BOX_BYTES // size, box_rows, 1][: matrix.dim()]
    return driver.encode_tensor_map(
        matrix.data_ptr(), list(reversed(matrix.shape)), strides, box, ELEMENTS[matrix.dtype]
    )


def heads_map(rows: torch.Tensor, box_columns: int, box_heads: int, box_rows: int) -> bytes:
    """The map of bfloat16 or float16 `rows` [n, heads, columns] of one stride each, in multiples of 16 bytes.

    A box is 128 bytes of columns x `box_heads` x `box_rows`, a row's heads one after the other, swizzled by 128 bytes
    in shared memory; outside it is zero.
    """
    element = {torch.bfloat16: "bfloat16", torch.float16: "float16"}[rows.dtype]
    num_rows, num_heads, num_columns = rows.shape
    row_bytes = 2 * rows.stride(0)
    head_bytes = 2 * rows.stride(1) if num_heads > 1 else row_bytes
    assert 2 * box_columns == BOX_BYTES and box_heads * box_rows <= MAX_BOX_ROWS, (box_columns, box_heads, box_rows)
    assert rows.stride(2) == 1 and rows.data_ptr() % 16 == row_bytes % 16 == head_bytes % 16 == 0, rows.stride()
    sizes, box = [num_columns, num_heads, num_rows], [box_columns, box_heads, box_rows]
    return driver.encode_tensor_map(rows.data_ptr(), sizes, [head_bytes, row_bytes], box, element)


def line_map(matrix: torch.Tensor, box_columns: int) -> bytes:
    """The map of float32 `matrix` [rows, columns], rows on 16-byte boundaries; boxes of one row, plain, 0 outside."""
    assert matrix.dtype == torch.float32 and matrix.dim() == 2, (matrix.dtype, matrix.shape)
    stride = 4 * matrix.stride(0)
    assert matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 and stride % 16 == 0 and 1 <= box_columns <= 256, (
        matrix.stride()
    )
    sizes = list(reversed(matrix.shape))
    return driver.encode_tensor_map(matrix.data_ptr(), sizes, [stride], [box_columns, 1], "float32", swizzled=False)


def device_maps(maps: list[bytes], device: torch.device) -> torch.Tensor:
    """[n, MAP_BYTES] uint8 on the device. Synchronises: for set-up."""
    if not maps:
        return torch.empty((0, MAP_BYTES), dtype=torch.uint8, device=device)
    host = torch.frombuffer(bytearray(b"".join(maps)), dtype=torch.uint8).view(len(maps), MAP_BYTES)
    copy = host.to(device)
    assert copy.data_ptr() % MAP_BYTES == 0
    return copy
