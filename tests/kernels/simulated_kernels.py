"""Checks of the kernels in the CUDA simulator; test_simulator.py runs this file in a process of its own.

NUMBA_ENABLE_CUDASIM must be set before Numba is imported, and cannot be unset afterwards.
"""

import pytest
import torch

from pipemoe import e4m3
from pipemoe_kernels.activation import activate_rows, activation_kernel
from pipemoe_kernels.combine import combine_kernel, combine_rows
from pipemoe_kernels.gather import gather_kernel, gather_rows, padded_columns
from pipemoe_kernels.gemm.simt import grouped_gemm, grouped_simt_kernel
from pipemoe_kernels.index.portable import index_kernels, index_pairs, num_tiles
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.numba_cuda import SIMULATOR
from pipemoe_kernels.pack import pack_kernel
from pipemoe_kernels.quantise import dequantise_kernel, dequantise_rows, quantise_kernel, quantise_rows
from tests.kernels.cases import (
    ROUTINGS,
    check_pack,
    expected_activations,
    expected_combine,
    expected_grouped_gemm,
    expected_index,
    make_ids,
    wire_rows,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-7}
STREAM = Stream.current(torch.device("cpu"))


def test_this_is_the_simulator():
    assert SIMULATOR


@pytest.mark.parametrize("name, tile, group", [*((name, 64, 8) for name in ROUTINGS), ("several tiles", 128, 32)])
def test_index(name, tile, group):
    ids, first, num_local = make_ids(name)
    rows = wire_rows(torch.zeros(len(ids), 8), ids, torch.zeros(ids.shape))
    kernels = index_kernels(tile, group)
    tile_counts = torch.full((num_tiles(ids.numel(), kernels) * num_local,), 77, dtype=torch.int32)
    offsets, positions = torch.full((num_local,), 77).int(), torch.full(ids.shape, 77).int()
    index_pairs(STREAM, rows.ids, first, num_local, tile_counts, offsets, positions, kernels)
    wanted_offsets, wanted_positions = expected_index(ids, first, num_local)
    assert torch.equal(offsets, wanted_offsets)
    assert torch.equal(positions, wanted_positions)


@pytest.mark.parametrize("hidden, dtype", [(8, torch.float32), (48, torch.bfloat16)])
def test_pack(hidden, dtype):
    check_pack(hidden, dtype, "cpu", STREAM, pack_kernel(4))


@pytest.mark.parametrize(
    "hidden, dtype", [(8, torch.float32), (31, torch.float32), (31, torch.bfloat16), (48, torch.bfloat16)]
)
def test_gather(hidden, dtype):
    ids, first, num_local = make_ids("several tiles")
    ids = ids[:40]
    offsets, positions = expected_index(ids, first, num_local)
    rows = wire_rows(torch.randn(len(ids), hidden).to(dtype), ids, torch.rand(ids.shape))
    x = torch.full((ids.numel(), padded_columns(hidden, dtype)), torch.nan, dtype=dtype)
    gather_rows(STREAM, rows.hidden, positions, x, gather_kernel(4))
    tokens, ks = torch.nonzero(positions >= 0, as_tuple=True)
    assert torch.equal(x[positions[tokens, ks].long(), :hidden], rows.hidden[tokens])
    assert x[int(offsets[-1]) :].isnan().all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(has_bias, dtype):
    offsets = torch.tensor([0, 3, 3, 9, 11, 11]).int()
    h, bias = torch.randn(20, 2 * 13).to(dtype), torch.randn(6, 2 * 13).to(dtype) if has_bias else None
    a = torch.full((20, 13), torch.nan, dtype=dtype)
    activate_rows(STREAM, h, bias, offsets, a, kernel=activation_kernel(dtype, has_bias, 4))
    wanted = expected_activations(h, bias, offsets)
    assert (a[:11].double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert a[11:].isnan().all()


@pytest.mark.parametrize(
    "dtype, out_dtype, has_bias",
    [
        *((torch.float32, out_dtype, True) for out_dtype in (*DTYPES, torch.float64)),
        *((torch.bfloat16, out_dtype, False) for out_dtype in (torch.bfloat16, torch.float64)),
        (torch.float16, torch.float32, True),
    ],
)
def test_combine(dtype, out_dtype, has_bias):
    ids, first, num_local = make_ids("several tiles")
    ids = ids[:12]
    offsets, positions = expected_index(ids, first, num_local)
    rows = wire_rows(torch.zeros(len(ids), 8), ids, torch.rand(ids.shape))
    y = torch.randn(ids.numel(), 9).to(dtype)
    y[int(offsets[-1]) :] = torch.nan
    bias = torch.randn(num_local, 9).to(dtype) if has_bias else None
    out = torch.full((len(ids), 12), torch.nan, dtype=out_dtype)
    kernel = combine_kernel(dtype, out_dtype, has_bias, 4)
    combine_rows(STREAM, y, positions, rows.ids, first, rows.weights, bias, out[:, :9], kernel)
    on_grid = out_dtype == torch.float64
    wanted = expected_combine(y, positions, ids, first, rows.weights, bias, on_grid=on_grid)
    assert torch.equal(out[:, :9], wanted) if on_grid else True
    assert (out[:, :9].double() - wanted).norm() <= TOLERANCE[out_dtype] * wanted.norm()
    assert out[:, 9:].isnan().all()


@pytest.mark.parametrize(
    "dtype, num_columns, depth", [(torch.float32, 9, 7), (torch.bfloat16, 11, 19), (torch.float16, 3, 5)]
)
def test_grouped_gemm(dtype, num_columns, depth):
    offsets = torch.tensor([0, 3, 3, 21, 22, 22]).int()
    x = torch.randn(30, depth + 2).to(dtype)[:, :depth]
    w = torch.randn(6, num_columns, depth).to(dtype)
    out = torch.full((30, num_columns), torch.nan, dtype=dtype)
    grouped_gemm(STREAM, x, w, offsets, out, grouped_simt_kernel(dtype, 2), side=2)
    wanted = expected_grouped_gemm(x, w, offsets)
    assert (out[:22].double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert out[22:].isnan().all()


@pytest.mark.parametrize("dtype, hidden", [(torch.float32, 128), (torch.bfloat16, 384), (torch.float16, 256)])
def test_quantised_rows_are_the_hosts_and_back(dtype, hidden):
    x = (torch.randn(3, hidden) * torch.tensor([[1e-3], [1.0], [1e3]])).to(dtype)
    x[1, :128] = 0
    # Of two arguments that share memory, as the parts of wire rows do, the simulator forgets what one of them got.
    values = torch.full((3, hidden + 8), 0xAB, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((3, hidden // 128 + 1), torch.nan)
    quantise_rows(STREAM, x, values[:, :hidden], scales[:, :-1], quantise_kernel(dtype, 32))
    wanted, wanted_scales = e4m3.quantise_rows(x)
    assert torch.equal(values.view(torch.uint8)[:, :hidden], wanted.view(torch.uint8))
    assert torch.equal(scales[:, :-1], wanted_scales)
    assert bool((values.view(torch.uint8)[:, hidden:] == 0xAB).all()) and scales[:, -1].isnan().all()
    again = torch.full((3, hidden + 8), torch.nan, dtype=dtype)
    dequantise_rows(STREAM, values[:, :hidden], scales[:, :-1], again[:, :hidden], dequantise_kernel(dtype, 32))
    assert torch.equal(again[:, :hidden], e4m3.dequantise_rows(wanted, wanted_scales, dtype))
    assert again[:, hidden:].isnan().all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, float("inf"), float("nan")])
def test_bfloat16_rounds_as_torch_does(value):
    out = torch.empty(1, 1, dtype=torch.bfloat16)
    y, one = torch.tensor([[value]]), torch.ones(1, 1)
    zero = torch.zeros(1, 1).int()
    kernel = combine_kernel(torch.float32, torch.bfloat16, False, 1)
    combine_rows(STREAM, y, zero, zero, 0, one, None, out, kernel)
    assert torch.equal(out, (y + 0.0).bfloat16()) or (out.isnan().all() and y.isnan().all())
