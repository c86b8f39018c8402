"""The kernels on a GPU, with the tiles that experts use, against the same oracles as in the simulator."""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe_kernels.activation import activate_rows
from pipemoe_kernels.combine import combine_rows
from pipemoe_kernels.gather import gather_rows, padded_columns
from pipemoe_kernels.gemm.simt import grouped_gemm
from pipemoe_kernels.index.portable import index_kernels, index_pairs, num_tiles
from pipemoe_kernels.launch.kernel import Stream
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


def stream() -> Stream:
    return Stream.current(torch.device("cuda"))


@pytest.mark.parametrize(
    "hidden, dtype", [(8, torch.float32), (1000, torch.float16), (2048, torch.bfloat16), (7168, torch.bfloat16)]
)
def test_pack(hidden, dtype):
    check_pack(hidden, dtype, "cuda", stream())


def run_index(ids, first, num_local):
    rows = wire_rows(torch.zeros(len(ids), 8), ids, torch.zeros(ids.shape), "cuda")
    num_counts = num_tiles(ids.numel(), index_kernels()) * num_local
    tile_counts = torch.full((num_counts,), 77, dtype=torch.int32, device="cuda")
    offsets = torch.full((num_local,), 77, dtype=torch.int32, device="cuda")
    positions = torch.full(ids.shape, 77, dtype=torch.int32, device="cuda")
    index_pairs(stream(), rows.ids, first, num_local, tile_counts, offsets, positions)
    return offsets.cpu(), positions.cpu()


def check_index(ids, first, num_local):
    offsets, positions = run_index(ids, first, num_local)
    wanted_offsets, wanted_positions = expected_index(ids, first, num_local)
    assert torch.equal(offsets, wanted_offsets)
    assert torch.equal(positions, wanted_positions)


@pytest.mark.parametrize("name", ROUTINGS)
def test_index(name):
    check_index(*make_ids(name))


@pytest.mark.parametrize(
    "num_rows, top_k, num_experts, first, num_local",
    [
        (16384, 8, 256, 32, 32),
        (16384, 8, 256, 0, 256),
        (5000, 6, 512, 0, 512),
        (100_000, 8, 128, 16, 16),
        (1025, 1, 3, 1, 1),
        (3000, 4, 130, 1, 127),
    ],
)
def test_index_of_many_pairs(num_rows, top_k, num_experts, first, num_local):
    generator = torch.Generator().manual_seed(1)
    check_index(torch.randint(-1, num_experts, (num_rows, top_k), generator=generator).int(), first, num_local)


def test_index_with_all_rows_on_one_expert():
    check_index(torch.full((9000, 2), 5, dtype=torch.int32), 3, 7)


@pytest.mark.parametrize("hidden", [8, 31, 96, 7168])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather(hidden, dtype):
    ids, first, num_local = make_ids("several tiles")
    offsets, positions = expected_index(ids, first, num_local)
    rows = wire_rows(torch.randn(len(ids), hidden).to(dtype), ids, torch.rand(ids.shape), "cuda")
    x = torch.full((ids.numel(), padded_columns(hidden, dtype)), torch.nan, dtype=dtype, device="cuda")
    gather_rows(stream(), rows.hidden, positions.cuda(), x)
    tokens, ks = torch.nonzero(positions >= 0, as_tuple=True)
    assert torch.equal(x.cpu()[positions[tokens, ks].long(), :hidden], rows.hidden.cpu()[tokens])
    assert x[int(offsets[-1]) :].isnan().all()


@pytest.mark.parametrize("intermediate", [13, 768])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(has_bias, dtype, intermediate):
    counts = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(0))
    counts[[0, 7, 8, 39]] = 0
    offsets = counts.cumsum(0).int()
    total = int(offsets[-1])
    h = torch.randn(total + 50, 2 * intermediate).to(dtype)
    h[total:] = torch.nan
    bias = torch.randn(40, 2 * intermediate).to(dtype) if has_bias else None
    a = torch.full((total + 50, intermediate), torch.nan, dtype=dtype, device="cuda")
    activate_rows(stream(), h.cuda(), None if bias is None else bias.cuda(), offsets.cuda(), a)
    wanted = expected_activations(h, bias, offsets)
    assert (a.cpu()[:total].double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert a[total:].isnan().all()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [*DTYPES, torch.float64])
def test_combine(has_bias, dtype, out_dtype):
    ids, first, num_local = make_ids("several tiles")
    offsets, positions = expected_index(ids, first, num_local)
    rows = wire_rows(torch.zeros(len(ids), 8), ids, torch.rand(ids.shape), "cuda")
    y = torch.randn(ids.numel(), 300).to(dtype)
    y[int(offsets[-1]) :] = torch.nan
    bias = torch.randn(num_local, 300).to(dtype) if has_bias else None
    out = torch.full((len(ids), 304), torch.nan, dtype=out_dtype, device="cuda")
    combine_rows(
        stream(),
        y.cuda(),
        positions.cuda(),
        rows.ids,
        first,
        rows.weights,
        None if bias is None else bias.cuda(),
        out[:, :300],
    )
    on_grid = out_dtype == torch.float64
    wanted = expected_combine(y, positions, ids, first, rows.weights.cpu(), bias, on_grid=on_grid)
    actual = out.cpu()
    if on_grid:
        assert torch.equal(actual[:, :300], wanted)
    assert (actual[:, :300].double() - wanted).norm() <= TOLERANCE[out_dtype] * wanted.norm()
    assert actual[:, 300:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_columns, depth", [(9, 7), (160, 96), (129, 200)])
def test_grouped_gemm(dtype, num_columns, depth):
    counts = torch.tensor([3, 0, 64, 65, 1, 0, 200, 0])
    offsets = counts.cumsum(0).int()
    total = int(offsets[-1])
    x, w = torch.randn(total + 30, depth + 3).to(dtype), torch.randn(8, num_columns, depth).to(dtype)
    x[total:] = torch.nan
    out = torch.full((total + 30, num_columns), torch.nan, dtype=dtype, device="cuda")
    grouped_gemm(stream(), x.cuda()[:, :depth], w.cuda(), offsets.cuda(), out)
    wanted = expected_grouped_gemm(x[:, :depth], w, offsets)
    assert (out.cpu()[:total].double() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
    assert out[total:].isnan().all()
