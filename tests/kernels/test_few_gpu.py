"""Products and experts of few rows on a GPU, against float64."""

import importlib.util

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90"
    ),
]
if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe_kernels.gating import Gating
from pipemoe_kernels.gemm.few import few_rows
from pipemoe_kernels.gemm.few_experts import few_experts
from pipemoe_kernels.launch.kernel import Stream

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32
CUDA = torch.device("cuda")
ERROR = {BF16: 5e-3, HALF: 7e-4, FLOAT: 2e-6}


def ratio(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("columns, depth", [(5120, 2048), (2048, 4096), (128, 2048), (16, 256), (48, 768)])
@pytest.mark.parametrize("dtype, out_dtype, adds", [(BF16, BF16, True), (BF16, FLOAT, False), (HALF, HALF, True)])
def test_few_rows(num_rows, columns, depth, dtype, out_dtype, adds):
    g = torch.Generator(device="cuda").manual_seed(num_rows)
    x = torch.randn(num_rows, depth + 24, generator=g, device="cuda").to(dtype)[:, 8 : depth + 8]
    w = (torch.randn(columns, depth, generator=g, device="cuda") / depth**0.5).to(dtype)
    whole = torch.randn(num_rows + 1, columns + 8, generator=g, device="cuda").to(out_dtype)
    out, before = whole[:num_rows, :columns], whole.clone()
    few_rows(Stream.current(CUDA), x, w, out, adds=adds)
    wanted = x.double() @ w.double().t() + (before[:num_rows, :columns].double() if adds else 0)
    assert ratio(out, wanted) < ERROR[out_dtype]
    assert torch.equal(whole[num_rows:], before[num_rows:]) and torch.equal(whole[:, columns:], before[:, columns:])
    again = before.clone()[:num_rows, :columns]
    few_rows(Stream.current(CUDA), x, w, again, adds=adds)
    assert torch.equal(again, out)


def test_a_product_waits_for_what_makes_its_rows():
    """A row of kernels, each of which fetches its weights while the one before still runs."""
    g = torch.Generator(device="cuda").manual_seed(0)
    w = [(torch.randn(2048, 2048, generator=g, device="cuda") / 2048**0.5).to(BF16) for _ in range(20)]
    x = torch.randn(3, 2048, generator=g, device="cuda").to(BF16)
    for _ in range(20):
        found, wanted = x, x
        for matrix in w:
            out = torch.empty_like(found)
            few_rows(Stream.current(CUDA), found, matrix, out)
            found = out
        for matrix in w:
            out = torch.empty_like(wanted)
            few_rows(Stream.current(CUDA), wanted, matrix, out)
            torch.cuda.synchronize()
            wanted = out
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "hidden, intermediate, top_k, num_local, first",
    [(2048, 768, 8, 128, 0), (256, 256, 3, 5, 2), (1024, 512, 2, 8, 0), (4096, 768, 6, 16, 8)],
)
@pytest.mark.parametrize("out_dtype", [BF16, FLOAT])
def test_few_experts(num_rows, hidden, intermediate, top_k, num_local, first, out_dtype):
    """Rows that share experts, ids of no expert and of others' experts, and a row that has none here."""
    g = torch.Generator(device="cuda").manual_seed(num_rows)

    def normal(*shape):
        return torch.randn(shape, generator=g, device="cuda")

    x = normal(num_rows, hidden + 64).to(BF16)[:, :hidden]
    gate_up = (normal(num_local, 2 * intermediate, hidden) / hidden**0.5).to(BF16)
    down = (normal(num_local, hidden, intermediate) / intermediate**0.5).to(BF16)
    rows = torch.zeros(num_rows, 2 * top_k + 2, device="cuda")
    ids, weights = rows.view(torch.int32)[:, :top_k], rows[:, top_k : 2 * top_k]
    for t in range(num_rows):
        ids[t] = torch.randperm(top_k + 2, generator=g, device="cuda")[:top_k] + (t % 2) + first - 1
    ids[num_rows // 2, 0] = -1
    weights.copy_(torch.rand(num_rows, top_k, generator=g, device="cuda"))
    a = torch.full((num_rows * top_k * intermediate,), torch.nan, dtype=BF16, device="cuda")
    out = torch.full((num_rows, hidden), torch.nan, dtype=out_dtype, device="cuda")
    gating = "silu" if num_rows != 3 else Gating("silu", limit=1.0, up_offset=1.0)
    few_experts(Stream.current(CUDA), x, ids, weights, first, gate_up, down, a, out, gating)
    wanted = torch.zeros(num_rows, hidden, dtype=torch.float64, device="cuda")
    for t in range(num_rows):
        for k in range(top_k):
            e = int(ids[t, k]) - first
            if 0 <= e < num_local:
                gate, up = (gate_up[e].double() @ x[t].double()).split(intermediate)
                if num_rows == 3:
                    gate, up = gate.clamp(max=1.0), up.clamp(-1.0, 1.0) + 1.0
                of_pair = (torch.nn.functional.silu(gate) * up).to(BF16).double()
                wanted[t] += float(weights[t, k]) * (down[e].double() @ of_pair)
    assert ratio(out, wanted) < 5e-3
    ids.fill_(first + num_local)
    few_experts(Stream.current(CUDA), x, ids, weights, first, gate_up, down, a, out, gating)
    assert not out.any()
