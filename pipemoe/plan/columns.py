"""Blocks of columns: the parts of a wave's partial sums that are combined while the next part is still computed.

The weights of the down projection are read once, a block of its output columns at a time; each finished block travels
by itself.
"""

from __future__ import annotations

from pipemoe.errors import InputError

MANY_COLUMNS = 256  # a block narrower than a kernel's tile would only cost launches


def most_blocks(hidden: int) -> int:
    """Blocks that `hidden` columns can be cut into."""
    return max(1, hidden // 8)


def column_ranges(hidden: int, num_blocks: int) -> list[range]:
    """`num_blocks` ranges of columns of about equal size; they begin at multiples of 256, of 64 or of 8, whatever there
    are enough of.
    """
    if not 1 <= num_blocks <= most_blocks(hidden):
        raise InputError(
            f"{hidden} columns in {num_blocks} blocks: at least 1 and at most {most_blocks(hidden)} are possible"
        )
    unit = next((unit for unit in (MANY_COLUMNS, 64, 8) if hidden // unit >= num_blocks), hidden)
    units = hidden // unit
    starts = [unit * (units * block // num_blocks) for block in range(num_blocks)]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], hidden], strict=True)]
