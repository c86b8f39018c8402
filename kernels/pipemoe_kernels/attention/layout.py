"""Where things lie in a block's shared memory, and how its threads divide the work; see forward.py."""

from __future__ import annotations

from pipemoe_kernels.launch.tensor_map import MAP_BYTES
from pipemoe_kernels.ptx.attention import BOX_COLUMNS

ROWS = 128  # of a tile of queries
CONSUMERS = 2  # warpgroups, with 64 rows each
THREADS = 128 * (1 + CONSUMERS)
CONSUMER_WARPS = 4 * CONSUMERS
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
NUM_STAGES = 2  # of keys, and of values
BOX_BYTES = ROWS * 2 * BOX_COLUMNS
GROUP_BYTES = BOX_BYTES // CONSUMERS  # of a box, from a consumer's rows to the next one's
# Barriers: a copy has landed; all consumer warps are done with it.
Q_FULL, Q_EMPTY, K_FULL, K_EMPTY, V_FULL, V_EMPTY = 0, 8, 16, 32, 48, 64
TILE_AT = 128  # what the tile is, a word each:
# 1, or 0 where there is none any more; the first row among all queries; rows of the piece from there on; which heads;
# keys that the first row sees; the first tile of keys and the one behind the last; keys of the piece
HAS_TILE, FIRST_ROW, ROWS_LEFT, HEAD_SET, SEEN, BEGIN, END, NUM_KEYS = range(TILE_AT, TILE_AT + 32, 4)
MAPS_AT = 256  # of queries, keys and values
Q_AT = 1024
ALIGNMENT = 1024
assert MAPS_AT + 3 * MAP_BYTES <= Q_AT


class RingLayout:
    """For one pair of head sizes. A copy is boxes of 64 columns x 128 rows, one behind the other."""

    def __init__(self, head_dim: int, value_dim: int):
        self.key_boxes, self.value_boxes = head_dim // BOX_COLUMNS, value_dim // BOX_COLUMNS
        self.key_bytes, self.value_bytes = self.key_boxes * BOX_BYTES, self.value_boxes * BOX_BYTES
        self.keys_at = Q_AT + self.key_bytes
        self.values_at = self.keys_at + NUM_STAGES * self.key_bytes

    @property
    def shared_bytes(self) -> int:
        """With room to align it."""
        return ALIGNMENT + self.values_at + NUM_STAGES * self.value_bytes
