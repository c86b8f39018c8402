"""How many bytes a token's row has in a dispatch: its layout is pipemoe.wire's."""

from __future__ import annotations

ROW_ALIGNMENT = 128  # bytes; a whole number of 16-byte vectors and of cache lines


def row_bytes(hidden: int, value_bytes: int, top_k: int, num_scales: int = 0) -> int:
    """Of `hidden` values, their scales, and a float32 weight and an int32 id for each of `top_k` experts."""
    values = -(-hidden * value_bytes // 4) * 4  # weights are aligned for an odd `hidden` of 2-byte values too
    return -(-(values + 4 * num_scales + 8 * top_k) // ROW_ALIGNMENT) * ROW_ALIGNMENT
