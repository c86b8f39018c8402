"""Numba CUDA kernels of pipemoe and their asserting host wrappers: they know tensors, not ranks.

Importing this package imports neither Numba nor torch; each module with a kernel does. Modules, each about one noun:
index, gather, activation, combine, grouped_simt (kernels for any GPU); index_hopper, grouped_wgmma with grouped_roles and raster,
combine_lanes (kernels for Hopper); element (number formats), tensor_map; ptx, ptx_hopper, ptx_wgmma, ptx_activation, ptx_lanes (every PTX
string); launch, driver, cubin_cache (compile, keep, load, launch); numba_cuda (the only place that imports numba.cuda).
"""
