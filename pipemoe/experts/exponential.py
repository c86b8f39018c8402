"""exp of a float32 in compiled code, as plain arithmetic: in a loop it becomes vector instructions, which a call of a
library does not.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pipemoe.compiled import Compiled

_LEAST, _MOST = np.float32(-87.33), np.float32(88.37)  # beyond these, results would not be normal numbers
_LOG2_E = np.float32(1 / math.log(2))
_HIGH, _LOW = np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)  # ln 2 in two parts, the first exact
# Adding it to a float32 below 2^22 rounds that to a whole number, which then stands in the lowest bits.
_ROUNDING = np.float32(1.5 * 2**23)
_MANTISSA_BITS = 23
# exp(r) = 1 + r + r^2 (...) for |r| <= ln(2) / 2; fitted to relative errors of 2 in the last place
_TERMS = tuple(map(np.float32, (1.9872e-4, 1.3982e-3, 8.33345e-3, 4.1665796e-2, 0.16666665, 0.5)))


@intrinsic
def _times_power(typing_context, value, rounded):
    """value * 2^n, where n is the whole number in the lowest bits of `rounded`."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(32)
        bits, power = (builder.bitcast(argument, word) for argument in arguments)
        shifted = builder.add(bits, builder.shl(power, ir.Constant(word, _MANTISSA_BITS)))
        return builder.bitcast(shifted, ir.FloatType())

    return types.float32(types.float32, types.float32), generate


def _exp(x):
    """exp(x), a few units in the last place off; NaN for NaN."""
    bounded = _LEAST if x < _LEAST else x
    bounded = _MOST if bounded > _MOST else bounded
    rounded = bounded * _LOG2_E + _ROUNDING
    power = rounded - _ROUNDING
    r = (bounded - power * _HIGH) - power * _LOW
    a, b, c, d, e, f = _TERMS
    sum_of_terms = ((((a * r + b) * r + c) * r + d) * r + e) * r + f
    return _times_power(np.float32(1) + r + r * r * sum_of_terms, rounded) + (bounded - bounded)


exp = Compiled(_exp, inside=True, nogil=True, error_model="numpy", forceinline=True)
