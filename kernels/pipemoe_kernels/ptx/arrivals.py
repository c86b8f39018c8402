"""PTX of the arrival-driven GEMM: words in device memory, by which blocks and the stream of the rows talk.

load_flag(global)                     a 32-bit word, with all that its writer wrote before it (acquire)
load_batch(global)                    the same for a 64-bit word that a block of this grid has written
replace_batch(global, old, new)       writes `new` if `old` is there; returns what was there (acquires and releases)
pause()                               a few hundred nanoseconds
barrier_of_producers()                the 128 threads of the first warpgroup wait for one another; whole warps only
"""

from __future__ import annotations

from pipemoe_kernels.ptx.hopper import U32, U64, instruction

# The GPU's front end writes flags, not one of its threads: hence the scope `sys`.
load_flag = instruction("ld.acquire.sys.global.b32 $0, [$1];", U32, U64)
load_batch = instruction("ld.acquire.gpu.global.b64 $0, [$1];", U64, U64)
replace_batch = instruction("atom.acq_rel.gpu.global.cas.b64 $0, [$1], $2, $3;", U64, U64, U64, U64)
pause = instruction("nanosleep.u32 200;", None)
barrier_of_producers = instruction("bar.sync 1, 128;", None)
