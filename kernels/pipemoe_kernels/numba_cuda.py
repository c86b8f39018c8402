"""The one place that imports numba.cuda, so that its needs are met first.

numba-cuda up to 0.30 uses numpy.row_stack, which NumPy 2.5 removed; it was an alias of vstack.
"""

import numpy

if not hasattr(numpy, "row_stack"):
    numpy.row_stack = numpy.vstack

from numba import cuda, types
from numba.core import config

# NUMBA_ENABLE_CUDASIM=1: kernels run as Python threads on NumPy arrays. No PTX, no shuffles, no ballots.
SIMULATOR = bool(config.ENABLE_CUDASIM)

__all__ = ["SIMULATOR", "cuda", "types"]
