"""The bisection finds the largest rate, and tries few."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.errors import InputError
from pipemoe.traffic.capacity import capacity, rates_around


@given(count=st.integers(1, 40), good=st.integers(0, 40), first=st.none() | st.integers(0, 39))
def test_the_largest_rate_that_meets_is_found(count, good, first):
    rates, tried = [float(n) for n in range(count)], []

    def meets(rate):
        tried.append(rate)
        return rate < good

    first = None if first is None else min(first, count - 1)
    assert capacity(rates, meets, first) == (None if good == 0 else float(min(good, count) - 1))
    assert len(set(tried)) == len(tried) <= math.ceil(math.log2(count + 1)) + 1


def test_rates_hold_the_middle_and_both_ends():
    rates = rates_around(10.0, 0.5, 2.0, 2**0.25)
    assert rates == pytest.approx([10 * 2 ** (n / 4) for n in range(-4, 5)]) and 10.0 in rates
    assert rates_around(3.0, 1.0, 1.0, 2.0) == [3.0]
    with pytest.raises(InputError):
        rates_around(1.0, 2.0, 3.0, 1.1)
