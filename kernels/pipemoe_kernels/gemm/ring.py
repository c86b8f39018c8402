"""The ring of stages between the warpgroups of a grouped GEMM on Hopper, for roles.py and fp8_roles.py.

Every function here is inlined into the kernel.
"""

from __future__ import annotations

from pipemoe_kernels.launch.kernel import UINT32
from pipemoe_kernels.numba_cuda import cuda
from pipemoe_kernels.ptx import cluster as ptx_cluster
from pipemoe_kernels.ptx import hopper as ptx

TILE_ROWS = 128
GROUP_ROWS = 64  # rows of one consumer warpgroup
CONSUMERS = TILE_ROWS // GROUP_ROWS
NUM_STAGES = 4
EMPTY_AT = 8 * NUM_STAGES  # the barriers "empty" after the barriers "full"
X_BOXES = (128, 64, 32, 16)  # rows of the boxes of x's tensor maps, in the maps' order


@cuda.jit(device=True, inline="always")
def next_stage(stage, parity):
    stage = UINT32(stage + 1)
    if stage == NUM_STAGES:
        stage = UINT32(0)
        parity ^= UINT32(1)
    return stage, parity


@cuda.jit(device=True, inline="always")
def announce_rest(thread, barriers, stage, issued):
    """After the last tile: announce the stages that a gathering producer has not announced yet."""
    ptx.wait_for_all_copies()
    cuda.syncwarp()
    if thread & UINT32(31) == 0:
        if issued >= 2:
            ptx.barrier_arrive(barriers + 8 * ((stage + NUM_STAGES - 2) % NUM_STAGES))
        if issued >= 1:
            ptx.barrier_arrive(barriers + 8 * ((stage + NUM_STAGES - 1) % NUM_STAGES))


@cuda.jit(device=True, inline="always")
def release(barrier, blocks):
    """Say at an "empty" barrier that a consumer warp is done with the stage; in a pair, to both, as each fills both."""
    ptx.barrier_arrive(barrier)
    if blocks == 2:
        ptx_cluster.barrier_arrive_at_other(barrier)


@cuda.jit(device=True, inline="always")
def skip_tile(barriers, stage, parity, steps, together, lane, blocks=UINT32(1)):
    """A warpgroup without rows only says that it is done with each stage."""
    for _ in range(UINT32(steps + (UINT32(1) << together) - 1) >> together):
        full = UINT32(barriers + 8 * stage)
        ptx.barrier_wait(full, parity)
        cuda.syncwarp()  # no lane may still wait for a phase that the others have passed
        if lane == 0:
            release(full + EMPTY_AT, blocks)
        stage, parity = next_stage(stage, parity)
    return stage, parity
