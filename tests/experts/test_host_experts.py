"""Host experts against the oracle: shapes, dtypes, routing of every kind, memory, bad input."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemoe.errors import InputError
from pipemoe.experts import host, make_experts, pairs
from pipemoe_kernels.gating import ACTIVATIONS
from tests.experts.oracle import (
    GATINGS,
    TOLERANCE,
    expected,
    make_rows,
    random_rows,
    random_weights,
    relative_error,
    slice_experts,
)


def run(rows, weights, *, out_dtype=torch.float32, max_rows=None, deterministic=False):
    experts = make_experts(
        [weights],
        top_k=rows.ids.shape[1],
        hidden=rows.hidden.shape[1],
        device="cpu",
        dtype=rows.hidden.dtype,
        deterministic=deterministic,
    )
    scratch = experts.new_scratch(len(rows) if max_rows is None else max_rows)
    out = torch.full(rows.hidden.shape, torch.nan, dtype=torch.float64 if deterministic else out_dtype)
    experts(0, rows, out, scratch)
    return out


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(0, 40),
    hidden=st.integers(1, 70),
    intermediate=st.integers(1, 50),
    num_experts=st.integers(1, 9),
    top_k=st.integers(1, 5),
    first=st.integers(0, 9),
    count=st.integers(0, 9),
    bias=st.booleans(),
    deterministic=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_sizes(num_rows, hidden, intermediate, num_experts, top_k, first, count, bias, deterministic, seed):
    weights = random_weights(num_experts, hidden, intermediate, bias=bias, seed=seed)
    start = min(first, num_experts)
    weights = slice_experts(weights, range(start, min(start + count, num_experts)))
    rows = random_rows(num_rows, hidden, num_experts, top_k, seed=seed)
    out = run(rows, weights, deterministic=deterministic)
    assert relative_error(out, expected(rows, weights)) < 1e-5


@pytest.mark.parametrize("num_rows", [0, 1, 600])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_awkward_sizes(num_rows, bias, dtype):
    weights = random_weights(10, 96, 80, dtype=dtype, bias=bias)
    rows = random_rows(num_rows, 96, 10, 3, dtype=dtype)
    wanted = expected(rows, weights)
    assert relative_error(run(rows, weights), wanted) < TOLERANCE[dtype]
    assert relative_error(run(rows, weights, deterministic=True), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("does", [False, True])
@pytest.mark.parametrize("num_rows", [1, 17, 700])
def test_whether_or_not_the_cpu_multiplies_bfloat16(monkeypatch, does, num_rows):
    monkeypatch.setattr(host, "multiplies_bfloat16", lambda: does)
    monkeypatch.setattr(host, "LARGE_WEIGHTS", 1)
    weights = random_weights(5, 72, 40, dtype=torch.bfloat16, bias=True)
    rows = random_rows(num_rows, 72, 5, 3, dtype=torch.bfloat16)
    assert relative_error(run(rows, weights), expected(rows, weights)) < TOLERANCE[torch.bfloat16]
    experts = make_experts([weights], top_k=3, hidden=72, device="cpu", dtype=torch.bfloat16)
    assert (len(experts.new_scratch(4).gate_up) == 0) == does  # nothing is widened


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype, activation, gated, bias):
    weights = random_weights(5, 48, 40, dtype=dtype, bias=bias, activation=activation, gated=gated)
    rows = random_rows(70, 48, 5, 2, dtype=dtype)
    assert relative_error(run(rows, weights), expected(rows, weights)) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", GATINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clamped(dtype, form):
    weights, rows = random_weights(5, 48, 40, dtype=dtype, bias=True, **form), random_rows(70, 48, 5, 2, dtype=dtype)
    found = run(rows, weights)
    assert relative_error(found, expected(rows, weights)) < TOLERANCE[dtype]
    assert relative_error(found, expected(rows, replace(weights, limit=None))) > 0.01  # or the limit was not reached


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_is_the_float32_sum_rounded_once(out_dtype):
    weights, rows = random_weights(6, 96, 80), random_rows(150, 96, 6, 3)
    full = run(rows, weights)
    assert torch.equal(run(rows, weights, out_dtype=out_dtype), full.to(out_dtype))


def test_all_rows_on_one_expert():
    weights = random_weights(4, 32, 24)
    rows = random_rows(300, 32, 4, 2, ids=torch.tensor([[2, -1]]).repeat(300, 1))
    assert relative_error(run(rows, weights), expected(rows, weights)) < 1e-6


def test_an_expert_named_twice_in_a_row_counts_twice():
    weights = random_weights(1, 32, 24)
    rows = random_rows(20, 32, 1, 3, ids=torch.zeros(20, 3))
    assert relative_error(run(rows, weights), expected(rows, weights)) < 1e-6


@pytest.mark.parametrize("ids", [[-1, -1], [7, 8], [2**31 - 1, -(2**31)]])
def test_rows_without_a_local_expert_are_zero(ids):
    weights = random_weights(3, 32, 24, first_expert=2)
    rows = random_rows(5, 32, 9, 2, ids=torch.tensor([ids]).repeat(5, 1))
    assert torch.equal(run(rows, weights), torch.zeros(5, 32))


def test_no_local_expert_gives_zeros():
    weights = slice_experts(random_weights(3, 32, 24), range(1, 1))
    assert torch.equal(run(random_rows(5, 32, 3, 2), weights), torch.zeros(5, 32))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(deterministic, dtype):
    weights, rows = random_weights(4, 96, 80, dtype=dtype), random_rows(50, 96, 4, 4, dtype=dtype)
    rows.ids.copy_(torch.arange(4).expand(50, 4))
    clean = run(rows, weights, deterministic=deterministic)
    rows.hidden[17] = torch.nan
    out = run(rows, weights, deterministic=deterministic)
    others = torch.arange(50) != 17
    assert out[17].isnan().all()
    assert torch.equal(out[others], clean[others])


def test_scratch_is_reused_without_a_trace():
    """Different calls on one scratch give what fresh scratches give, and the scratch keeps its buffers."""
    weights = random_weights(5, 64, 48)
    experts = make_experts([weights], top_k=3, hidden=64, device="cpu", dtype=torch.float32)
    scratch = experts.new_scratch(100)
    experts.warm_up(scratch)
    addresses = scratch.y.data_ptr(), scratch.positions.ctypes.data
    size = scratch.num_bytes
    for num_rows in (100, 3, 0, 57):
        rows = random_rows(num_rows, 64, 5, 3, seed=num_rows)
        out = torch.full((num_rows, 64), torch.nan)
        experts(0, rows, out, scratch)
        assert torch.equal(out, run(rows, weights))
    assert (scratch.y.data_ptr(), scratch.positions.ctypes.data, scratch.num_bytes) == (*addresses, size)


def test_rows_of_a_wave_may_be_a_slice_and_out_may_be_strided():
    weights, rows = random_weights(4, 32, 24), random_rows(40, 32, 4, 2)
    wide = torch.full((40, 48), torch.nan)
    experts = make_experts([weights], top_k=2, hidden=32, device="cpu", dtype=torch.float32)
    experts(0, rows[10:30], wide[10:30, :32], experts.new_scratch(64))
    assert relative_error(wide[10:30, :32], expected(rows, weights)[10:30]) < 1e-6
    assert wide[:, 32:].isnan().all() and wide[:10].isnan().all() and wide[30:].isnan().all()


def test_no_call_compiles():
    """One row, a strided out and other layouts must not reach Numba's compiler inside a step."""
    weights = random_weights(4, 32, 24, bias=True)
    experts = make_experts([weights], top_k=2, hidden=32, device="cpu", dtype=torch.float32)
    scratch = experts.new_scratch(10)
    experts.warm_up(scratch)
    functions = (pairs.index_pairs, pairs.gather_rows, pairs.activate_rows, pairs.combine_rows)
    compiled = [len(function.dispatcher.signatures) for function in functions]
    for num_rows in (1, 2, 10):
        rows = random_rows(12, 32, 4, 2)[2 : 2 + num_rows]
        experts(0, rows, torch.empty(num_rows, 32), scratch)
        experts(0, rows, torch.empty(num_rows, 40)[:, :32], scratch)
    assert [len(function.dispatcher.signatures) for function in functions] == compiled


def test_threads_with_a_scratch_each():
    weights, rows = random_weights(5, 64, 48), random_rows(200, 64, 5, 3)
    experts = make_experts([weights], top_k=3, hidden=64, device="cpu", dtype=torch.float32)
    wanted = run(rows, weights)

    def work(_):
        out = torch.empty(200, 64)
        experts(0, rows, out, experts.new_scratch(200))
        return out

    with ThreadPoolExecutor(4) as pool:
        assert all(relative_error(out, wanted.double()) < 1e-6 for out in pool.map(work, range(12)))


def test_layers_use_their_own_weights():
    layers = [random_weights(4, 32, 24, seed=seed) for seed in range(3)]
    rows = random_rows(10, 32, 4, 2)
    experts = make_experts(layers, top_k=2, hidden=32, device="cpu", dtype=torch.float32)
    scratch = experts.new_scratch(10)
    for layer, weights in enumerate(layers):
        out = torch.empty(10, 32)
        experts(layer, rows, out, scratch)
        assert relative_error(out, expected(rows, weights)) < 1e-6


def bad_calls():
    rows = random_rows(8, 32, 4, 2)
    good = torch.empty(8, 32)
    return {
        "layer 1 does not exist": (1, rows, good),
        "do not fit a scratch": (0, random_rows(9, 32, 4, 2), torch.empty(9, 32)),
        "rows.hidden is torch.float32 (8, 16)": (0, random_rows(8, 16, 4, 2), good),
        "rows.hidden is torch.bfloat16": (0, random_rows(8, 32, 4, 2, dtype=torch.bfloat16), good),
        "rows.ids is (8, 3)": (0, random_rows(8, 32, 4, 3), good),
        "out is torch.float64": (0, rows, good.double()),
        "out is torch.float32 (8, 31)": (0, rows, good[:, :31]),
        "strides (1, 8)": (0, rows, torch.empty(32, 8).t()),
    }


@pytest.mark.parametrize("message", list(bad_calls()))
def test_bad_calls(message):
    experts = make_experts([random_weights(4, 32, 24)], top_k=2, hidden=32, device="cpu", dtype=torch.float32)
    layer, rows, out = bad_calls()[message]
    with pytest.raises(InputError) as error:
        experts(layer, rows, out, experts.new_scratch(8))
    assert message in str(error.value)


def test_make_rows_keeps_values():
    x = torch.arange(12.0).reshape(3, 4)
    rows = make_rows(x, torch.ones(3, 2), torch.full((3, 2), 0.5))
    assert torch.equal(rows.hidden, x) and rows.ids.dtype == torch.int32
