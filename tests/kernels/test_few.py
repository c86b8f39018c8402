"""Products and experts of few rows, thread by thread, against float64."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("numba_cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from pipemoe_kernels.gemm import few, few_experts
from tests.kernels import few_emulator

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


class Element:
    """Tensors in place of pointers."""

    pointer = None

    @staticmethod
    def load(flat, place):
        return float(flat[place])

    @staticmethod
    def store(flat, place, value):
        flat[place] = value


class Emulated:
    """In place of Kernel."""

    def __init__(self, function, parameters, threads, *, shared_bytes, **options):
        self.function, self.threads, self.shared_bytes = function, threads, shared_bytes


@pytest.fixture
def emulated(monkeypatch):
    few_emulator.install(monkeypatch, few, few_experts)
    for module in (few, few_experts):
        monkeypatch.setattr(module, "ELEMENTS", dict.fromkeys((BF16, HALF, FLOAT), Element))
        monkeypatch.setattr(module, "Kernel", Emulated)


def made(factory, *arguments):
    """A kernel of the stand-ins, not of the factory's cache."""
    return factory.__wrapped__(*arguments)


def close(found, wanted, dtype):
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < {BF16: 6e-3, HALF: 8e-4, FLOAT: 1e-6}[dtype], error


@pytest.mark.parametrize(
    "num_rows, depth, dtype, out_dtype, adds",
    [(1, 256, BF16, BF16, False), (7, 512, HALF, FLOAT, True), (13, 256, BF16, BF16, True), (16, 512, BF16, FLOAT, 0)],
)
def test_few_rows(emulated, num_rows, depth, dtype, out_dtype, adds):
    torch.manual_seed(num_rows)
    whole = torch.randn(num_rows, depth + 24).to(dtype)
    x, w = whole[:, 8 : depth + 8], (torch.randn(32, depth) / depth**0.5).to(dtype)
    out = torch.randn(num_rows, 40).to(out_dtype)
    before = out.clone()
    kernel = made(few.few_rows_kernel, dtype, out_dtype, depth, num_rows > 8, bool(adds))
    few_emulator.launch(
        kernel,
        range(2),
        [0],
        (x.data_ptr(), 2 * x.stride(0), num_rows, w.data_ptr(), 2 * w.stride(0), out.view(-1), out.stride(0)),
    )
    wanted = x.double() @ w.double().t() + (before[:, :32].double() if adds else 0)
    close(out[:, :32], wanted, out_dtype)
    assert torch.equal(out[:, 32:], before[:, 32:])


@pytest.mark.parametrize("num_rows", [1, 3])
def test_few_experts(emulated, num_rows):
    """Rows that share experts, ids of no expert and of others' experts, and values of padding."""
    torch.manual_seed(num_rows)
    hidden, intermediate, top_k, num_local, first = 256, 256, 3, 4, 2
    x = torch.randn(num_rows, hidden).to(BF16)
    gate_up = (torch.randn(num_local, 2 * intermediate, hidden) / hidden**0.5).to(BF16)
    down = (torch.randn(num_local, hidden, intermediate) / intermediate**0.5).to(BF16)
    rows = torch.zeros(num_rows, 2 * top_k + 2)  # ids, weights
    ids, weights = rows.view(torch.int32)[:, :top_k], rows[:, top_k : 2 * top_k]
    ids.copy_(torch.tensor([[3, 5, 7], [5, -1, 3], [-1, 3, 2]])[:num_rows])
    weights.copy_(torch.rand(num_rows, top_k))
    a, out = torch.zeros(num_rows * top_k, intermediate, dtype=BF16), torch.zeros(num_rows, hidden)
    gate_up_kernel = made(few_experts.few_gate_up_kernel, hidden, top_k, "silu")
    down_kernel = made(few_experts.few_down_kernel, intermediate, top_k, FLOAT)
    of_ids = ids.data_ptr(), 4 * ids.stride(0), first, num_local
    few_emulator.launch(
        gate_up_kernel,
        [0, intermediate // 8 - 1],
        range(num_rows * top_k),
        (x.data_ptr(), 2 * x.stride(0), num_rows, *of_ids, gate_up.data_ptr(), intermediate, a.view(-1)),
    )
    wanted_a, wanted = torch.zeros_like(a), torch.zeros(num_rows, hidden, dtype=torch.float64)
    for t in range(num_rows):
        for k in range(top_k):
            e = int(ids[t, k]) - first
            if 0 <= e < num_local:
                gate, up = (gate_up[e].double() @ x[t].double()).split(intermediate)
                wanted_a[t * top_k + k] = torch.nn.functional.silu(gate) * up
                wanted[t] += float(weights[t, k]) * (down[e].double() @ wanted_a[t * top_k + k].double())
    for columns in (slice(0, 8), slice(-8, None)):
        close(a[:, columns], wanted_a[:, columns].double(), BF16)
    few_emulator.launch(
        down_kernel,
        [0, hidden // 16 - 1],
        range(num_rows),
        (wanted_a.data_ptr(), *of_ids, weights.data_ptr(), down.data_ptr(), hidden, out.view(-1), hidden),
    )
    for columns in (slice(0, 16), slice(-16, None)):
        close(out[:, columns], wanted[:, columns], FLOAT)
