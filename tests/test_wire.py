"""The wire format: aligned rows whose parts do not overlap."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.e4m3 import quantise_rows
from pipemoe.errors import ConfigError
from pipemoe.plan.row import ROW_ALIGNMENT
from pipemoe.wire import WireFormat

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(st.integers(1, 300), st.integers(1, 16), st.sampled_from(DTYPES), st.integers(0, 5))
def test_what_is_written_is_read(hidden, top_k, dtype, n):
    wire = WireFormat(hidden, top_k, dtype)
    assert wire.row_bytes % ROW_ALIGNMENT == 0
    buffer = torch.full((n + 2, wire.row_bytes), 255, dtype=torch.uint8)
    rows = wire.rows(buffer)[1 : n + 1]
    x = torch.arange(n * hidden).reshape(n, hidden).remainder(97).to(dtype)
    ids = torch.arange(n * top_k, dtype=torch.int32).reshape(n, top_k)
    weights = ids / 3
    rows.write(x, ids, weights)
    again = wire.rows(buffer.clone())[1 : n + 1]
    assert len(again) == n
    assert torch.equal(again.hidden, x) and torch.equal(again.ids, ids) and torch.equal(again.weights, weights)
    assert (buffer[0] == 255).all() and (buffer[n + 1] == 255).all()


@given(st.integers(1, 4), st.integers(1, 16), st.integers(0, 5))
def test_e4m3_rows_carry_their_scales(blocks, top_k, n):
    hidden = 128 * blocks
    wire = WireFormat(hidden, top_k, torch.float8_e4m3fn)
    buffer = torch.full((n + 2, wire.row_bytes), 255, dtype=torch.uint8)
    rows = wire.rows(buffer)[1 : n + 1]
    x = torch.randn(n, hidden).bfloat16()
    ids = torch.arange(n * top_k, dtype=torch.int32).reshape(n, top_k)
    rows.write(x, ids, ids / 3)
    again = wire.rows(buffer.clone())[1 : n + 1]
    values, scales = quantise_rows(x)
    assert torch.equal(again.hidden.view(torch.uint8), values.view(torch.uint8)) and torch.equal(again.scales, scales)
    assert torch.equal(again.ids, ids) and torch.equal(again.weights, ids / 3)
    assert (buffer[0] == 255).all() and (buffer[n + 1] == 255).all()


def test_e4m3_rows_need_whole_blocks():
    with pytest.raises(ConfigError, match="hidden is 200; .* multiple of 128"):
        WireFormat(200, 2, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("hidden", "top_k", "dtype", "row_bytes"),
    [(7168, 8, torch.bfloat16, 14464), (2048, 8, torch.bfloat16, 4224), (7168, 8, torch.float8_e4m3fn, 7552)],
)
def test_row_sizes_of_real_models(hidden, top_k, dtype, row_bytes):
    assert WireFormat(hidden, top_k, dtype).row_bytes == row_bytes


def test_a_layout_has_one_number_whatever_the_rows():
    """Launches are kept ready by it: rows that lie otherwise must not share a number."""
    wire, others = (
        WireFormat(96, 3, torch.bfloat16),
        [WireFormat(97, 3, torch.bfloat16), WireFormat(96, 2, torch.bfloat16)],
    )
    others += [WireFormat(96, 3, torch.float16), WireFormat(96, 3, torch.float32)]

    def rows(wire, n):
        return wire.rows(torch.zeros((n, wire.row_bytes), dtype=torch.uint8))

    whole = rows(wire, 8)
    same = [rows(wire, 5), whole[2:4], rows(WireFormat(96, 3, torch.bfloat16), 1), whole[:0]]
    assert whole.layout >= 0 and {r.layout for r in same} == {whole.layout}
    numbers = [whole.layout, whole[::2].layout, *(rows(other, 8).layout for other in others)]
    assert len(set(numbers)) == len(numbers) and -1 not in numbers
    for name in ("hidden", "ids", "weights"):
        assert replace(whole, **{name: getattr(whole, name)[:7]}).layout == -1
