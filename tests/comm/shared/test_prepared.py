"""Prepared calls: as what they stand for."""

import pytest
import torch
from numba import types

from pipemoe.addresses import call_at
from pipemoe.comm.shared.prepared import PreparedRows, PreparedSums
from pipemoe.comm.shared.waves import add_in_order
from pipemoe.compiled import Compiled
from pipemoe.wire import WireFormat


@pytest.fixture(scope="module")
def make():
    """Makes a prepared call."""

    def made(function, arguments):
        call_at(function, arguments)

    compiled = Compiled(made, signatures=lambda: [types.void(types.int64, types.int64)])
    return lambda call: compiled(call.function, call.arguments)


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [(1,), (7, 3)])
def test_sums_are_those_of_add_in_order(make, num_ranks, num_rows):
    g, width = torch.Generator().manual_seed(0), 9
    wide = [[torch.randn(n, 2 * width, generator=g) for _ in range(num_ranks)] for n in num_rows]
    parts = [[part[:, :width] for part in of_segment] for of_segment in wide]
    wanted, found = ([torch.empty(n, width) for n in num_rows] for _ in range(2))
    for of_segment, result in zip(parts, wanted, strict=True):
        add_in_order(of_segment, result)
    sums = PreparedSums(parts, width)
    assert not sums.go_to([torch.empty(n, width, dtype=torch.bfloat16) for n in num_rows])
    assert not sums.go_to([torch.empty(n, width + 1)[:, :width] for n in num_rows])
    assert not sums.go_to([torch.empty(n, width, dtype=torch.float64) for n in num_rows])
    for dtype in (torch.float64, torch.bfloat16):
        others = PreparedSums([[p.to(dtype) for p in of_segment] for of_segment in parts], width)
        assert not others.go_to(found) and not others.go_to([result.to(dtype) for result in found])
    assert sums.go_to(found)
    make(sums.call)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("num_rows", [(1,), (4, 2)])
def test_rows_are_those_of_wire_rows(make, num_rows):
    g, wire = torch.Generator().manual_seed(0), WireFormat(10, 3, torch.float32)
    wanted, found = ([wire.rows(torch.zeros(n, wire.row_bytes, dtype=torch.uint8)) for n in num_rows] for _ in range(2))
    rows = [
        (
            torch.randn(n, 10, generator=g),
            torch.randint(0, 99, (n, 3), generator=g).int(),
            torch.rand(n, 3, generator=g),
        )
        for n in num_rows
    ]
    for part, of_segment in zip(wanted, rows, strict=True):
        part.write(*of_segment)
    packs = PreparedRows(found)
    assert not packs.come_from([(x.bfloat16(), ids, weights) for x, ids, weights in rows])
    assert not packs.come_from([(x, ids.long(), weights) for x, ids, weights in rows])
    assert packs.come_from(rows)
    make(packs.call)
    assert all(torch.equal(a.buffer, b.buffer) for a, b in zip(found, wanted, strict=True))
