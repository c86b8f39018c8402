"""Sizes of a bfloat16 row tile on Hopper: 64 rows of x for each consumer warpgroup, with 256 rows of w.

    consumers   rows   stage: x + w   registers: producer, consumers      w passes the L2 cache
    2           128    16 + 32 KB     56, 224 (or 168 each, see below)    once for every 128 rows of an expert
    3           192    24 + 32 KB     32, 160                             once for every 192 rows
    2 x 2       256    16 + 32 KB     as 128                              once for every 256 rows

The last is a pair of blocks (a cluster) with 128 rows each; each block fetches half of the w tile, for both.

Two consumers get by with equal shares of the registers. Three do not: their kernels must be linked whole
(Kernel.moves_registers). There, threads start with 128 registers, for which the assembler refuses products of 256
columns, so three consumers make products of 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipemoe_kernels.gemm.raster import MAX_EXPERTS
from pipemoe_kernels.gemm.ring import EMPTY_AT, GROUP_ROWS, NUM_STAGES, X_BOXES

STEP_BYTES = 128  # of a row in a stage
TILE_COLUMNS = 256  # rows of w in a stage
W_BYTES = TILE_COLUMNS * STEP_BYTES
ENDS_AT = 2 * EMPTY_AT
RING_AT = ENDS_AT + 4 * (MAX_EXPERTS + 1) + 1023 & ~1023
ALIGNMENT = 1024  # of the ring
MAX_SHARED_BYTES = 227 * 1024  # of a block


@dataclass(frozen=True)
class TileShape:
    """consumers: of a block. product_columns: rows of w in one product. blocks: how many share a tile's w, 1 or 2."""

    consumers: int
    consumer_registers: int
    producer_registers: int = 56
    moves_registers: bool = False
    product_columns: int = 256
    blocks: int = 1

    @property
    def block_rows(self) -> int:
        return GROUP_ROWS * self.consumers

    @property
    def rows(self) -> int:
        return self.block_rows * self.blocks

    @property
    def threads(self) -> int:
        return 128 * (1 + self.consumers)

    @property
    def x_boxes(self) -> tuple[int, ...]:
        """Rows of the boxes of x's tensor maps, in the maps' order; the first holds all rows of a block."""
        return X_BOXES if self.block_rows == X_BOXES[0] else (self.block_rows, *X_BOXES)

    @property
    def x_bytes(self) -> int:
        return self.block_rows * STEP_BYTES

    @property
    def stage_bytes(self) -> int:
        return self.x_bytes + W_BYTES

    @property
    def shared_bytes(self) -> int:
        """With room to align the ring, in case the array is not aligned as it says; 192 rows leave no such room."""
        return min(ALIGNMENT + RING_AT + NUM_STAGES * self.stage_bytes, MAX_SHARED_BYTES)


ROWS_128 = TileShape(consumers=2, consumer_registers=224)
ROWS_192 = TileShape(
    consumers=3, consumer_registers=160, producer_registers=32, moves_registers=True, product_columns=128
)
ROWS_256 = TileShape(consumers=2, consumer_registers=224, blocks=2)
SHAPES = {shape.rows: shape for shape in (ROWS_128, ROWS_192, ROWS_256)}
PAIRED_ROWS = 768
PAIRED_OPERATIONS = 2e12  # some 3 ms
PAIRED_SMS = 100  # with fewer, another rank's collectives may hold one of two neighbours (a shared GPU)


def shape_for(expected_rows: float, operations: float, num_sms: int) -> TileShape:
    """The shape for a call of `operations` on `num_sms` multiprocessors, if an expert can expect `expected_rows` rows,
    give or take their square root.

    192 rows if those do not fit one tile of 128 but one of 192 (measured at 128 rows: 1.3 times as fast). 256 if there
    is so much to do that the GPU reaches its limit of power, where moving fewer bytes is faster: 1.03 to 1.15 times.
    Otherwise pairs take 1.03 to 1.12 times as long, since their blocks wait for each other. Else 128.
    """
    if expected_rows >= PAIRED_ROWS and operations >= PAIRED_OPERATIONS and num_sms >= PAIRED_SMS:
        return ROWS_256
    likely = expected_rows + math.sqrt(expected_rows)
    return ROWS_192 if ROWS_128.rows < likely <= ROWS_192.rows else ROWS_128
