"""The fp8 format: scales fill e4m3's range, and nothing but rounding is lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.e4m3 import BLOCK, LARGEST, dequantise_rows, dequantise_weight, quantise_rows, quantise_weight

HALF_STEP = 2.0**-4  # of a value of e4m3, relative; smaller values are multiples of 2^-9
TINY = 2.0**-10 / LARGEST  # half a step there, relative to the block's peak


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.floats(-30, 30), st.integers(0, 2**31))
def test_rows(n, blocks, exponent, seed):
    x = torch.randn(n, blocks * BLOCK, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values, scales = quantise_rows(x)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape and scales.shape == (n, blocks)
    peaks = x.view(n, blocks, BLOCK).abs().amax(2) if n else torch.zeros(0, blocks)
    assert torch.allclose(scales * LARGEST, peaks, rtol=1e-6, atol=1e-9)
    error = (dequantise_rows(values, scales, torch.float64) - x.double()).abs()
    assert bool(
        (error <= (HALF_STEP + 1e-5) * x.abs() + TINY * peaks.repeat_interleave(BLOCK, 1) * 1.001 + 1e-30).all()
    )


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_weights_of_any_size(rows, columns, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    values, scales = quantise_weight(w)
    assert values.shape == w.shape and scales.shape == (-(-rows // BLOCK), -(-columns // BLOCK))
    wide = dequantise_weight(values, scales, torch.float64)
    assert bool(((wide - w.double()).abs() <= (HALF_STEP + 1e-5) * w.abs() + TINY * 8).all())
    again = quantise_weight(wide.float())
    assert torch.allclose(dequantise_weight(*again, torch.float64), wide, rtol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(value):
    x = torch.ones(3, 2 * BLOCK)
    x[1, 5] = value
    wide = dequantise_rows(*quantise_rows(x), torch.float32)
    assert not bool(wide[1, 5].isfinite())
    assert torch.equal(wide[[0, 2]], x[[0, 2]]) and torch.equal(wide[1, BLOCK:], x[1, BLOCK:])


def test_zeros_stay_zeros():
    values, scales = quantise_rows(torch.zeros(2, BLOCK))
    assert bool(scales.isfinite().all()) and not bool(dequantise_rows(values, scales, torch.float32).any())
