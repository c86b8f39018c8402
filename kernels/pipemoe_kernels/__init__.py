"""Numba CUDA kernels of pipemoe and their asserting host wrappers: they know tensors, not ranks.

Importing this package imports neither Numba nor torch; each module with a kernel does. Modules, each about one noun:
index, gather, activation, combine, grouped_simt (kernels for any GPU); routing (from sm_80 on); quantise (rows to e4m3 and back);
index_hopper, grouped_wgmma with grouped_roles and raster, grouped_fp8 with fp8_roles, combine_lanes (kernels for Hopper); element
(number formats), tensor_map; ptx, ptx_hopper, ptx_wgmma, ptx_fp8, ptx_activation, ptx_lanes, ptx_warp (every PTX string), simulated,
simulated_warp (the same for the simulator); launch, driver, cubin_cache (compile, keep, load, launch); numba_cuda (the only place
that imports numba.cuda).
"""
