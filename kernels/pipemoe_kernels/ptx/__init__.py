"""Every PTX string of the kernels, behind Numba intrinsics."""
