"""PTX of pairs of thread blocks on neighbouring multiprocessors of Hopper (clusters of two), which share their memory.

rank()                                    of this block in its pair, 0 or 1
sync_pair()                               until all threads of both blocks are here; of what they wrote, only barriers
                                          that barrier_fence has announced are sure to be seen
leave_pair()                              the same, and behind all that they wrote and all arrivals at the other's
                                          barriers: a block that has ended takes no more
barrier_arrive_at_other(bar)              one arrival at the other block's barrier of the same place; waits for no
                                          write of this thread (a release for the cluster would wait for memory, at
                                          each stage)
load_box_3d_to_both(shared, map, bar, x, y, z)   bulk copy of one box to the same place of both blocks, announced at
                                          bar in each
"""

from __future__ import annotations

from pipemoe_kernels.ptx.hopper import U32, U64, instruction

rank = instruction("mov.u32 $0, %cluster_ctarank;", U32, side_effect=False)
sync_pair = instruction("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;", None)
leave_pair = instruction("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;", None)
barrier_arrive_at_other = instruction(
    """{
.reg .b32 other, remote;
mov.u32 other, %cluster_ctarank;
xor.b32 other, other, 1;
mapa.shared::cluster.u32 remote, $0, other;
mbarrier.arrive.shared::cluster.b64 _, [remote];
}""",
    None,
    U32,
)
load_box_3d_to_both = instruction(
    """{
.reg .b16 both;
mov.b16 both, 3;
cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [$0], [$1, {$3, $4, $5}],
    [$2], both;
}""",
    None,
    U32,
    U64,
    U32,
    U32,
    U32,
    U32,
)
