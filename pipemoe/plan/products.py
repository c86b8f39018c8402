"""Products of whole numbers that need more than 64 bits before they are divided. Compiled int64 wraps silently."""

from __future__ import annotations

from pipemoe.plan.compiled import compiled_part

_MOST_DIVISOR = 1 << 31  # its square fits int64


@compiled_part
def scaled(value, numerator, denominator):
    """value * numerator // denominator, exact wherever the result fits and the denominator is below 2**31; no operand
    is negative.
    """
    a, b = value // denominator, value % denominator
    c, d = numerator // denominator, numerator % denominator
    return a * c * denominator + a * d + b * c + b * d // denominator


@compiled_part
def in_proportion(value, part, whole):
    """value * part // whole for parts of at most `whole`; where that is 2**31 or more, right to one in 2**30."""
    while whole >= _MOST_DIVISOR:
        whole >>= 1
        part >>= 1
    return scaled(value, part, whole)
