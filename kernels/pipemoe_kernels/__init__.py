"""Numba CUDA kernels of pipemoe and their asserting host wrappers: they know tensors, not ranks.

Importing this package imports neither Numba nor torch; each module with a kernel does. Modules, each about one noun:
index, gather, swiglu, combine, grouped_simt (kernels); element (number formats); ptx (every PTX string); launch, driver
(compile, load, launch); numba_cuda (the only place that imports numba.cuda).
"""
