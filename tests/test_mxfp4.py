"""MXFP4 is widened as its definition says, and as transformers does it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.mxfp4 import widen


def naive(block, scale):
    """One value at a time, from the bits: sign, two of exponent, one of mantissa."""
    values = []
    for byte in block:
        for bits in (byte & 15, byte >> 4):
            exponent, mantissa = (bits >> 1) & 3, bits & 1
            size = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2 ** (exponent - 1)
            values.append((-size if bits & 8 else size) * 2.0 ** (scale - 127))
    return values


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=16, max_size=16), st.integers(90, 160))
def test_values_are_those_of_the_bits(block, scale):
    found = widen(torch.tensor(block, dtype=torch.uint8)[None], torch.tensor([scale], dtype=torch.uint8), torch.float64)
    assert found.tolist() == naive(block, scale)


def test_as_transformers_widens_it():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 131, (3, 8, 4), generator=generator, dtype=torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(
        blocks.clone(), scales.clone(), dtype=torch.bfloat16
    )  # [E, columns, rows]
    assert torch.equal(widen(blocks, scales, torch.bfloat16), theirs.transpose(1, 2))
