"""Hopper's kernels against the same oracles as the other kernels; experts' ends and sizes that do not fit tiles."""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe_kernels.combine_lanes import combine_lanes
from pipemoe_kernels.gemm.packed_wgmma import down_rows, gate_up_rows
from pipemoe_kernels.gemm.tile_shape import SHAPES
from pipemoe_kernels.gemm.wgmma import grouped_kernel
from pipemoe_kernels.index.hopper import MAX_BLOCKS, index_local_pairs
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.launch.tensor_map import device_maps, tensor_map
from tests.kernels.cases import (
    ROUTINGS,
    expected_activations,
    expected_combine,
    expected_grouped_gemm,
    expected_index,
    make_ids,
    wire_rows,
)

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6, torch.float64: 1e-7}
COUNTS = {
    "mixed": [3, 0, 64, 65, 1, 0, 129, 300, 0, 17],
    "one expert": [700],
    "near 192": [192, 193, 191, 128, 129, 127, 160, 384],
    "one row": [0, 1, 0],
    "none": [0, 0],
}


def stream() -> Stream:
    return Stream.current(torch.device("cuda"))


def check_index(ids, first, num_local):
    rows = wire_rows(torch.zeros(len(ids), 8), ids, torch.zeros(ids.shape), "cuda")
    shapes = ((MAX_BLOCKS * num_local,), (num_local,), ids.shape, (ids.numel(),))
    counts, offsets, positions, tokens = (torch.full(shape, 77, dtype=torch.int32, device="cuda") for shape in shapes)
    index_local_pairs(stream(), rows.ids, first, num_local, counts, offsets, positions, tokens)
    wanted_offsets, wanted_positions = expected_index(ids, first, num_local)
    assert torch.equal(offsets.cpu(), wanted_offsets)
    assert torch.equal(positions.cpu(), wanted_positions)
    named, ks = torch.nonzero(wanted_positions >= 0, as_tuple=True)
    assert torch.equal(tokens.cpu()[wanted_positions[named, ks].long()], named.int())
    assert bool((tokens[int(wanted_offsets[-1]) :] == 77).all())


@pytest.mark.parametrize("name", ROUTINGS)
def test_index(name):
    check_index(*make_ids(name))


@pytest.mark.parametrize(
    "num_rows, top_k, num_experts, first, num_local",
    [
        (16384, 8, 256, 32, 32),
        (512, 8, 512, 0, 512),
        (1_000_003, 8, 64, 0, 8),
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


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("hidden, intermediate", [(64, 32), (200, 136), (512, 384)])
@pytest.mark.parametrize("num_sms", [132, 5])
@pytest.mark.parametrize(
    "has_bias, activation, gated",
    [(False, "silu", True), (True, "gelu", True), (True, "relu", False), (False, "silu", False)],
)
@pytest.mark.parametrize("tile_rows", SHAPES)
def test_grouped_gemms(name, hidden, intermediate, num_sms, has_bias, activation, gated, tile_rows):
    """Both GEMMs on rows of a wire buffer that is poisoned where they must not look."""
    offsets = torch.tensor(COUNTS[name]).cumsum(0).int()
    num_local, total = len(offsets), int(offsets[-1])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    x = normal(total + 9, hidden)
    tokens = torch.randperm(total + 9, generator=generator)[:total].int()
    w_rows = 2 * intermediate if gated else intermediate
    gate_up, down = normal(num_local, w_rows, hidden) / 8, normal(num_local, hidden, intermediate) / 8
    bias = normal(num_local, w_rows) if has_bias else None
    rows = wire_rows(x, torch.full((len(x), 2), -1).int(), torch.full((len(x), 2), torch.nan), "cuda")
    a = torch.full((total + 200, intermediate), torch.nan, dtype=torch.bfloat16, device="cuda")
    y = torch.full((total + 200, hidden), torch.nan, dtype=torch.bfloat16, device="cuda")
    gate_up_kernel = grouped_kernel(gated=gated, has_bias=has_bias, activation=activation, shape=SHAPES[tile_rows])
    down_kernel = grouped_kernel(gated=False, shape=SHAPES[tile_rows])
    device, on_gpu = a.device, [gate_up.cuda(), down.cuda(), offsets.cuda(), tokens.cuda()]
    gate_up_maps = device_maps([tensor_map(on_gpu[0], box) for box in gate_up_kernel.w_boxes], device)
    down_maps = device_maps([tensor_map(on_gpu[1], box) for box in down_kernel.w_boxes], device)
    a_maps = device_maps([tensor_map(a, box) for box in down_kernel.shape.x_boxes], device)
    gate_up_rows(
        stream(),
        gate_up_kernel,
        rows.hidden,
        on_gpu[3],
        gate_up_maps.data_ptr(),
        on_gpu[2],
        None if bias is None else bias.cuda(),
        a,
        num_sms,
    )
    h = expected_grouped_gemm(x[tokens.long()], gate_up, offsets)
    wanted = expected_activations(h, bias, offsets, activation, gated)
    assert (a[:total].cpu().double() - wanted).norm() <= TOLERANCE[torch.bfloat16] * wanted.norm()
    assert bool(a[total:].isnan().all())
    down_rows(stream(), down_kernel, a_maps.data_ptr(), down_maps.data_ptr(), on_gpu[2], intermediate, y, num_sms)
    wanted = expected_grouped_gemm(a.cpu(), down, offsets)
    assert (y[:total].cpu().double() - wanted).norm() <= TOLERANCE[torch.bfloat16] * wanted.norm()
    assert bool(y[total:].isnan().all())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("out_dtype", TOLERANCE)
@pytest.mark.parametrize("hidden", [8, 328, 2048, 33000])
def test_combine(has_bias, out_dtype, hidden):
    ids, first, num_local = make_ids("several tiles")
    ids = ids[:40]
    offsets, positions = expected_index(ids, first, num_local)
    rows = wire_rows(torch.zeros(len(ids), 8), ids, torch.rand(ids.shape), "cuda")
    y = torch.randn(ids.numel(), hidden).bfloat16()
    y[int(offsets[-1]) :] = torch.nan
    bias = torch.randn(num_local, hidden).bfloat16() if has_bias else None
    out = torch.full((len(ids), hidden + 8), torch.nan, dtype=out_dtype, device="cuda")
    on_gpu = None if bias is None else bias.cuda()
    combine_lanes(stream(), y.cuda(), positions.cuda(), rows.ids, first, rows.weights, on_gpu, out[:, :hidden])
    on_grid = out_dtype == torch.float64
    wanted = expected_combine(y, positions, ids, first, rows.weights.cpu(), bias, on_grid=on_grid)
    actual = out.cpu()
    assert not on_grid or torch.equal(actual[:, :hidden], wanted)
    assert (actual[:, :hidden].double() - wanted).norm() <= TOLERANCE[out_dtype] * wanted.norm()
    assert bool(actual[:, hidden:].isnan().all())
