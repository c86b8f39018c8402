"""What a stage holds, whatever the rows and the slice of a tile: boxes do not touch one another, and reads stay in the
stage.
"""

import importlib.util

import pytest

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe_kernels.gemm.raster import MAX_EXPERTS, steps_in_stage
from pipemoe_kernels.gemm.ring import GROUP_ROWS, NUM_STAGES
from pipemoe_kernels.gemm.roles import GROUP_BYTES, x_step_bytes
from pipemoe_kernels.gemm.tile_shape import (
    ENDS_AT,
    MAX_SHARED_BYTES,
    RING_AT,
    ROWS_128,
    ROWS_192,
    SHAPES,
    STEP_BYTES,
    W_BYTES,
    shape_for,
)
from pipemoe_kernels.launch.kernel import UINT32

NUM_REGISTERS = 65536


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cuts", range(4))
def test_steps_in_a_stage(shape, cuts):
    w_bytes = W_BYTES >> cuts
    for num_rows in range(1, shape.block_rows + 1):
        together = int(steps_in_stage.py_func(UINT32(num_rows), UINT32(cuts), UINT32(shape.block_rows)))
        assert cuts > 0 or together == 0
        box_bytes = STEP_BYTES * min(box for box in shape.x_boxes if box >= num_rows)
        x_step = int(x_step_bytes.py_func(shape.stage_bytes, UINT32(w_bytes), UINT32(together)))
        steps = 1 << together
        assert x_step >= box_bytes and x_step % 1024 == 0 and steps * (x_step + w_bytes) == shape.stage_bytes
        # A warpgroup that has a row reads all of its 64.
        groups = -(-num_rows // GROUP_ROWS)
        assert (steps - 1) * x_step + groups * GROUP_BYTES <= shape.stage_bytes
        # As many steps as there is room for.
        assert 2 * steps * (box_bytes + w_bytes) > shape.stage_bytes


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_budgets(shape):
    assert 128 * (shape.producer_registers + shape.consumers * shape.consumer_registers) <= NUM_REGISTERS
    assert RING_AT + NUM_STAGES * shape.stage_bytes <= shape.shared_bytes <= MAX_SHARED_BYTES == 227 * 1024
    assert RING_AT % 1024 == 0 and ENDS_AT + 4 * (MAX_EXPERTS + 1) <= RING_AT
    assert shape.x_boxes[0] == shape.block_rows and shape.threads <= 1024


def test_whole_tiles_of_128_rows_are_packed_as_before():
    assert ROWS_128.stage_bytes == 48 * 1024 and ROWS_128.x_boxes == (128, 64, 32, 16)


def test_larger_tiles_where_one_of_them_likely_holds_what_two_smaller_ones_would():
    assert [shape_for(rows, 1e12, 132).rows for rows in (0, 1, 110, 118, 128, 175, 180, 192, 256, 10**6)] == [
        128,
        128,
        128,
        192,
        192,
        192,
        128,
        128,
        128,
        128,
    ]
    assert shape_for(128, 1e13, 132) is ROWS_192


def test_pairs_of_blocks_where_there_is_much_to_do():
    assert [
        shape_for(rows, operations, 119).rows for rows, operations in ((4096, 1.4e12), (700, 3e12), (1024, 2.9e12))
    ] == [128, 128, 256]
    assert shape_for(1024, 2.9e12, 33) is ROWS_128
