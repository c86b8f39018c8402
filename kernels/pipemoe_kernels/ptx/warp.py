"""PTX of one warp's work together, and of a number's bits, behind Numba intrinsics; from sm_80 on.

All 32 lanes call all but the last two lines together:

    max_over_lanes(value), min_over_lanes(value)   of uint32, in all lanes
    sum_over_lanes(value)                          of float32, in all lanes, always in the same order
    from_lane(value, lane)                         the float32 of a lane
    sync_lanes()                                   they wait for one another, and see what all wrote to memory
    bits_of(value), from_bits(bits)                float32 as uint32, and back
    round_to_bf16(value), round_to_half(value)     float32 to the nearest number of a 16-bit format

simulated_warp.py does the same for the CUDA simulator.
"""

from __future__ import annotations

from pipemoe_kernels.numba_cuda import types
from pipemoe_kernels.ptx.hopper import instruction

F32, U32 = types.float32, types.uint32

max_over_lanes = instruction("redux.sync.max.u32 $0, $1, 0xffffffff;", U32, U32)
min_over_lanes = instruction("redux.sync.min.u32 $0, $1, 0xffffffff;", U32, U32)
_ADD_OTHERS = "".join(
    f"shfl.sync.bfly.b32 other, $0, {n}, 31, 0xffffffff;\nadd.f32 $0, $0, other;\n" for n in (16, 8, 4, 2, 1)
)
sum_over_lanes = instruction("{\n.reg .f32 other;\nmov.f32 $0, $1;\n" + _ADD_OTHERS + "}", F32, F32)
from_lane = instruction("shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", F32, F32, U32)
sync_lanes = instruction("bar.warp.sync 0xffffffff;", None)
bits_of = instruction("mov.b32 $0, $1;", U32, F32, side_effect=False)
from_bits = instruction("mov.b32 $0, $1;", F32, U32, side_effect=False)
_ROUND = "{{\n.reg .b16 half, low;\ncvt.rn.{0}.f32 half, $1;\n{1}\n}}"
round_to_bf16 = instruction(
    _ROUND.format("bf16", "mov.b16 low, 0;\nmov.b32 $0, {low, half};"), F32, F32, side_effect=False
)
round_to_half = instruction(_ROUND.format("f16", "cvt.f32.f16 $0, half;"), F32, F32, side_effect=False)
