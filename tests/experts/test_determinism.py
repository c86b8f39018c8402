"""deterministic=True on the host: a row's bits depend on the row alone, and on no split of the experts over ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.experts import make_experts
from pipemoe.experts.host import HostExperts
from pipemoe.wire import WireFormat
from tests.experts.oracle import Case, random_rows, random_weights


def run(rows, weights, max_rows=None):
    experts = make_experts(
        [weights],
        top_k=rows.ids.shape[1],
        hidden=rows.hidden.shape[1],
        device="cpu",
        dtype=rows.hidden.dtype,
        deterministic=True,
    )
    out = torch.full(rows.hidden.shape, torch.nan, dtype=torch.float64)
    experts(0, rows, out, experts.new_scratch(max_rows or len(rows)))
    return out


def select(rows, order):
    """The rows in another order, in a buffer of their own."""
    wire = WireFormat(rows.hidden.shape[1], rows.ids.shape[1], rows.hidden.dtype)
    return wire.rows(rows.buffer[order].clone())


@settings(max_examples=30, deadline=None)
@given(
    num_rows=st.integers(1, 60),
    hidden=st.sampled_from([16, 31, 96, 200]),
    intermediate=st.sampled_from([8, 33, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_bits_depend_on_the_row_alone(num_rows, hidden, intermediate, dtype, bias, seed, data):
    weights = random_weights(5, hidden, intermediate, dtype=dtype, bias=bias, seed=seed)
    rows = random_rows(num_rows, hidden, 5, 3, dtype=dtype, seed=seed)
    whole = run(rows, weights)
    order = torch.tensor(data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=70)))
    assert torch.equal(run(select(rows, order), weights), whole[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden, intermediate", [(96, 80), (97, 35), (512, 256)])
def test_bits_do_not_depend_on_the_split_over_ranks(hidden, intermediate, dtype):
    num_rows = 90
    case = Case(
        random_rows(num_rows, hidden, 10, 4, dtype=dtype),
        random_weights(10, hidden, intermediate, dtype=dtype, bias=True),
    )
    whole = run(case.rows, case.weights)
    assert whole.abs().max() > 0.1
    for num_ranks in (1, 2, 3, 4, 13):
        partials = [run(case.rows, weights) for weights in case.split(num_ranks)]
        for order in (partials, partials[::-1]):
            assert torch.equal(sum(order, torch.zeros_like(whole)), whole)


def test_results_lie_on_the_grid():
    out = run(random_rows(30, 96, 4, 2), random_weights(4, 96, 80))
    assert torch.equal((out * 2.0**32).round() / 2.0**32, out)


def test_alone_and_in_a_crowd():
    rows, weights = random_rows(600, 96, 6, 3), random_weights(6, 96, 80)
    whole = run(rows, weights)
    for i in (0, 1, 15, 16, 17, 299, 599):
        assert torch.equal(run(rows[i : i + 1], weights, max_rows=5), whole[i : i + 1])


def test_a_library_that_minds_the_place_of_a_row_gets_tiles_of_one_row(monkeypatch):
    monkeypatch.setattr(HostExperts, "_library_treats_rows_alike", lambda self: False)
    rows, weights = random_rows(20, 32, 3, 2), random_weights(3, 32, 24)
    whole = run(rows, weights)
    assert torch.equal(run(rows[7:9], weights), whole[7:9])
