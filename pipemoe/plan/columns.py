"""Blocks of columns: the parts of a wave's partial sums that are combined while the next part is still computed.

The weights of the down projection are read once, a block of its output columns at a time; each finished block travels
by itself.
"""

from __future__ import annotations

from pipemoe.errors import InputError

MANY_COLUMNS = 256  # width of a kernel's tile: narrower blocks only cost launches


def most_blocks(hidden: int) -> int:
    """Blocks that `hidden` columns can be cut into."""
    return max(1, hidden // 8)


def column_ranges(hidden: int, num_blocks: int) -> list[range]:
    """`num_blocks` ranges of columns of about equal size. They begin at multiples of 256 if there are enough columns,
    else of 64, else of 8. Raises InputError if there are too few.
    """
    if not 1 <= num_blocks <= most_blocks(hidden):
        raise InputError(
            f"{hidden} columns in {num_blocks} blocks: at least 1 and at most {most_blocks(hidden)} are possible"
        )
    unit = next((unit for unit in (MANY_COLUMNS, 64, 8) if hidden // unit >= num_blocks), hidden)
    units = hidden // unit
    starts = [unit * (units * block // num_blocks) for block in range(num_blocks)]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], hidden], strict=True)]
