"""Numba CUDA kernels of pipemoe and their asserting host wrappers: they know tensors, not ranks.

Importing this package imports neither Numba nor torch; each module with a kernel does.

    routing, largest_keys            the router's top-k (from sm_80 on)
    index/                           which rows go to which expert: portable.py for any GPU, hopper.py
    gather, activation, combine      rows in the experts' order; gate x up; sums back in the tokens' order
    combine_lanes                    combine for bfloat16, 16 bytes at a time
    attention/                       a decoder layer around its products: norms, rotary embedding, latents
    placed_rows                      rows whose place is read from memory when a kernel runs
    gemm/                            grouped GEMMs: simt.py (any GPU), mma.py (sm_80 on), wgmma.py and fp8.py (Hopper)
    quantise, pack                   rows to e4m3 and back; rows to the wire format
    element                          number formats of matrices in memory
    ptx/                             every PTX string
    simulated, simulated_warp, _eights   what ptx/ does, for Numba's simulator
    launch/                          compile, keep on disk, load, pack arguments, launch, write onto a tape
    numba_cuda                       the only place that imports numba.cuda

In these files a *block* is a thread block; a scale's *block of values* is always called so. A
*pair* is a (token, k) pair, a *place* its row in the sorted order of the experts.
"""
