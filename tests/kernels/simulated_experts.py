"""The "torch" experts call on CPU tensors, its kernels in the CUDA simulator; test_simulator.py runs this file."""

from functools import partial

import pytest
import torch

from pipemoe.experts import torch_cuda
from pipemoe.experts.torch_cuda import TorchExperts
from pipemoe_kernels.activation import activate_rows, activation_kernel
from pipemoe_kernels.combine import combine_kernel, combine_rows
from pipemoe_kernels.gather import gather_kernel, gather_rows
from pipemoe_kernels.gating import ACTIVATIONS
from pipemoe_kernels.gemm.simt import grouped_gemm
from pipemoe_kernels.index.portable import index_kernels, index_pairs
from tests.experts.oracle import (
    GATINGS,
    TOLERANCE,
    expected,
    random_rows,
    random_weights,
    relative_error,
    slice_experts,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A simulated block is a Python thread per thread: make them few."""
    monkeypatch.setattr(torch_cuda, "index_kernels", partial(index_kernels, 32, 8))
    monkeypatch.setattr(torch_cuda, "index_pairs", partial(index_pairs, kernels=index_kernels(32, 8)))
    monkeypatch.setattr(torch_cuda, "gather_rows", partial(gather_rows, kernel=gather_kernel(2)))
    monkeypatch.setattr(torch_cuda, "grouped_gemm", partial(grouped_gemm, side=2))
    monkeypatch.setattr(torch_cuda, "activate_rows", small_activation)
    monkeypatch.setattr(torch_cuda, "combine_rows", small_combine)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


def small_activation(stream, h, bias, offsets, a, gating):
    kernel = activation_kernel(h.dtype, bias is not None, 4, gating=gating, gated=h.shape[1] != a.shape[1])
    activate_rows(stream, h, bias, offsets, a, gating, kernel)


def small_combine(stream, y, positions, ids, first, weights, bias, out):
    kernel = combine_kernel(y.dtype, out.dtype, bias is not None, 4)
    combine_rows(stream, y, positions, ids, first, weights, bias, out, kernel)


def run(rows, weights, out_dtype=torch.float32, deterministic=False):
    experts = TorchExperts(
        [weights],
        top_k=rows.ids.shape[1],
        hidden=rows.hidden.shape[1],
        device=torch.device("cpu"),
        dtype=rows.hidden.dtype,
        deterministic=deterministic,
    )
    scratch = experts.new_scratch(len(rows) + 3)
    for name in ("x", "a", "h"):
        getattr(scratch, name).fill_(torch.nan)
    out = torch.full(rows.hidden.shape, torch.nan, dtype=torch.float64 if deterministic else out_dtype)
    experts(0, rows, out, scratch)
    return experts, out


@pytest.mark.parametrize(
    "dtype, major, bias, deterministic, uses_grouped_mm",
    [
        (torch.float32, 9, True, False, False),
        (torch.bfloat16, 9, True, False, True),
        (torch.bfloat16, 9, False, True, True),
        (torch.bfloat16, 8, False, False, False),
        (torch.float16, 9, True, False, False),
    ],
)
def test_call(dtype, major, bias, deterministic, uses_grouped_mm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    weights = slice_experts(random_weights(5, 16, 8, dtype=dtype, bias=bias), range(1, 4))
    rows = random_rows(11, 16, 5, 3, dtype=dtype)
    experts, out = run(rows, weights, deterministic=deterministic)
    assert experts.uses_grouped_mm == uses_grouped_mm
    assert relative_error(out, expected(rows, weights)) < TOLERANCE[dtype]


FORMS = [{"activation": a, "gated": gated} for a in ACTIVATIONS for gated in (True, False)]


@pytest.mark.parametrize("form", [*FORMS[1:], *GATINGS], ids=str)
def test_gatings(form, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for dtype in (torch.float32, torch.bfloat16):
        weights = random_weights(3, 8, 8, dtype=dtype, bias=True, **form)
        rows = random_rows(5, 8, 3, 2, dtype=dtype)
        assert relative_error(run(rows, weights)[1], expected(rows, weights)) < TOLERANCE[dtype]


def test_warm_up_runs_every_kind_of_layer_and_result(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    layers = [random_weights(2, 8, 8, bias=bias) for bias in (False, True, True)]
    experts = TorchExperts(layers, top_k=2, hidden=8, device=torch.device("cpu"), dtype=torch.float32)
    calls = []
    monkeypatch.setattr(torch_cuda, "combine_rows", lambda *args: calls.append((args[6] is None, args[7].dtype)))
    experts.warm_up(experts.new_scratch(1))
    assert set(calls) == {(no_bias, dtype) for no_bias in (True, False) for dtype in experts.out_dtypes}


def test_sizes_that_grouped_mm_would_refuse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    weights = random_weights(3, 7, 5, dtype=torch.bfloat16)
    rows = random_rows(6, 7, 3, 2, dtype=torch.bfloat16)
    experts, out = run(rows, weights)
    assert not experts.uses_grouped_mm
    assert relative_error(out, expected(rows, weights)) < TOLERANCE[torch.bfloat16]


def test_no_rows_no_experts_no_local_pairs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    weights = random_weights(3, 8, 8, first_expert=4)
    for num_rows, experts in ((0, range(3)), (5, range(1, 1)), (5, range(3))):
        _, out = run(random_rows(num_rows, 8, 4, 2), slice_experts(weights, experts) if num_rows else weights)
        assert out.shape == (num_rows, 8)
    rows = random_rows(5, 8, 4, 2)
    assert torch.equal(run(rows, weights)[1], torch.zeros(5, 8))


def test_an_expert_named_twice_in_a_row_counts_twice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    weights, rows = random_weights(1, 8, 8), random_rows(6, 8, 1, 3, ids=torch.zeros(6, 3))
    assert relative_error(run(rows, weights)[1], expected(rows, weights)) < 1e-6
