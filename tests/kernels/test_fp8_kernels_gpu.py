"""Kernels in e4m3 on a GPU against their oracles: quantisation, and both grouped GEMMs on sizes that do not fit
tiles.
"""

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

from pipemoe.e4m3 import BLOCK, dequantise_rows, dequantise_weight, quantise_rows, quantise_weight
from pipemoe.wire import WireFormat
from pipemoe_kernels import quantise
from pipemoe_kernels.gemm.fp8 import down_fp8, gate_up_fp8, row_maps, weight_map
from pipemoe_kernels.launch.kernel import Stream
from pipemoe_kernels.launch.tensor_map import device_maps
from tests.kernels.cases import expected_activations, expected_grouped_gemm

E4M3, F64 = torch.float8_e4m3fn, torch.float64
COUNTS = {
    "mixed": [3, 0, 64, 65, 1, 0, 129, 300, 0, 17],
    "one expert": [700],
    "one row": [0, 1, 0],
    "none": [0, 0],
}


def stream() -> Stream:
    return Stream.current(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows, hidden", [(1, 128), (37, 384), (300, 7168)])
def test_quantised_rows_are_the_hosts_and_back(dtype, num_rows, hidden):
    x = (torch.randn(num_rows, hidden) * torch.logspace(-3, 3, num_rows)[:, None]).to(dtype)
    x[-1, :BLOCK] = 0
    wire = WireFormat(hidden, 2, E4M3)
    rows = wire.rows(torch.full((num_rows, wire.row_bytes), 0xAB, dtype=torch.uint8, device="cuda"))
    quantise.quantise_rows(stream(), x.cuda(), rows.hidden, rows.scales)
    values, scales = quantise_rows(x)
    assert torch.equal(rows.hidden.cpu().view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(rows.scales.cpu(), scales)
    assert bool((rows.buffer[:, wire.weights_offset :] == 0xAB).all())
    again = torch.full((num_rows, hidden + 8), torch.nan, dtype=dtype, device="cuda")
    quantise.dequantise_rows(stream(), rows.hidden, rows.scales, again[:, :hidden])
    assert torch.equal(again[:, :hidden].cpu(), dequantise_rows(values, scales, dtype))
    assert bool(again[:, hidden:].isnan().all())


def quantised_weights(w):
    pairs = [quantise_weight(matrix) for matrix in w]
    values, scales = torch.stack([v.view(torch.uint8) for v, _ in pairs]).view(E4M3), torch.stack([s for _, s in pairs])
    wide = torch.stack([dequantise_weight(v, s, F64) for v, s in pairs])
    return values.cuda(), scales.cuda(), wide


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("hidden, intermediate", [(128, 128), (384, 256), (640, 1152)])
@pytest.mark.parametrize("num_sms", [132, 5])
def test_grouped_gemms(name, hidden, intermediate, num_sms):
    """Both GEMMs on rows of a wire buffer that is poisoned where they must not look."""
    offsets = torch.tensor(COUNTS[name]).cumsum(0).int()
    num_local, total = len(offsets), int(offsets[-1])
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = torch.randperm(total + 9, generator=generator)[:total].int()
    gate_up, gate_up_scales, wide_gate_up = quantised_weights(
        normal(num_local, 2 * intermediate, hidden) * hidden**-0.5
    )
    down, down_scales, wide_down = quantised_weights(normal(num_local, hidden, intermediate) * intermediate**-0.5)
    wire = WireFormat(hidden, 2, E4M3)
    rows = wire.rows(torch.full((total + 9, wire.row_bytes), 0xFF, dtype=torch.uint8))
    rows.hidden.copy_((quantised := quantise_rows(normal(total + 9, hidden)))[0])
    rows.scales.copy_(quantised[1])
    x = dequantise_rows(*quantised, F64)
    on_gpu, offsets_gpu = wire.rows(rows.buffer.cuda()), offsets.cuda()
    height = -(-(total + 200) // 4) * 4
    a = torch.full((height, intermediate), 0xFF, dtype=torch.uint8, device="cuda").view(E4M3)
    a_scales = torch.full((intermediate // BLOCK, height), torch.nan, device="cuda")
    y = torch.full((height, hidden), torch.nan, dtype=torch.bfloat16, device="cuda")
    maps = device_maps(
        [weight_map(gate_up, gated=True), weight_map(down, gated=False), *row_maps(a, a_scales)], y.device
    )
    gate_up_fp8(
        stream(), on_gpu.hidden, tokens.cuda(), maps[0].data_ptr(), gate_up_scales, offsets_gpu, a, a_scales, num_sms
    )
    wanted = expected_activations(expected_grouped_gemm(x[tokens.long()], wide_gate_up, offsets), None, offsets)
    found = dequantise_rows(a.cpu(), a_scales.cpu().T.contiguous(), F64)
    rounded = dequantise_rows(*quantise_rows(wanted), F64)
    assert (found[:total] - wanted).norm() <= 3e-2 * wanted.norm()
    assert (found[:total] - rounded).norm() <= 1e-2 * wanted.norm()
    assert bool(found[total:].isnan().all()) and bool(a_scales[:, total:].isnan().all())
    down_fp8(stream(), maps[2].data_ptr(), maps[1].data_ptr(), down_scales, offsets_gpu, y, num_sms)
    wanted = expected_grouped_gemm(found, wide_down, offsets)
    assert (y[:total].cpu().double() - wanted).norm() <= 3e-3 * wanted.norm()
    assert bool(y[total:].isnan().all())
