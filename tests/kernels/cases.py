"""Cases and NumPy-like oracles of the kernels, shared by the simulator and the GPU tests."""

from __future__ import annotations

import torch

from pipemoe.wire import WireFormat, WireRows
from pipemoe_kernels.launch.kernel import Kernel, Stream
from pipemoe_kernels.pack import pack_rows
from tests.experts.oracle import FUNCTIONS

# rows, K, experts, first local expert, local experts
ROUTINGS = {
    "one row": (1, 2, 4, 0, 4),
    "several tiles": (150, 3, 10, 3, 4),
    "one local expert": (70, 2, 8, 7, 1),
    "many experts": (90, 4, 60, 0, 60),
}


def make_ids(name: str, seed: int = 0) -> tuple[torch.Tensor, int, int]:
    """ids [n, K] int32 of one routing with some -1, first local expert, number of local experts."""
    num_rows, top_k, num_experts, first, num_local = ROUTINGS[name]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts, (num_rows, top_k), generator=generator).int()
    return ids, first, num_local


def wire_rows(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, device: str = "cpu") -> WireRows:
    wire = WireFormat(hidden.shape[1], ids.shape[1], hidden.dtype)
    rows = wire.rows(torch.full((len(ids), wire.row_bytes), 0xAB, dtype=torch.uint8, device=device))
    rows.write(hidden.to(device), ids.to(device), weights.to(device))
    return rows


def check_pack(hidden: int, dtype: torch.dtype, device: str, stream: Stream, kernel: Kernel | None = None) -> None:
    """Rows that are parts of larger tensors go into the middle of a buffer, and nothing else of it changes."""
    num_rows, top_k = 7, 3
    x = torch.randn(num_rows + 1, hidden + 16).to(device, dtype)[1:, 16:]
    ids = torch.randint(-1, 99, (num_rows, top_k + 1), dtype=torch.int32).to(device)[:, 1:]
    weights = torch.rand(num_rows + 2, top_k).to(device)[2:]
    wire = WireFormat(hidden, top_k, dtype)
    buffer = torch.full((num_rows + 2, wire.row_bytes), 0xAB, dtype=torch.uint8, device=device)
    wanted = buffer.clone()
    rows = wire.rows(wanted)[1:-1]
    for source, view in ((x, rows.hidden), (ids, rows.ids), (weights, rows.weights)):
        view.copy_(source)
    pack_rows(stream, x, ids, weights, wire.rows(buffer)[1:-1].hidden, wire.row_bytes, kernel)
    assert torch.equal(buffer, wanted)


def expected_index(ids: torch.Tensor, first: int, num_local: int) -> tuple[torch.Tensor, torch.Tensor]:
    """offsets [E_loc], positions [n, K]: by a stable sort."""
    local = ids.flatten().long() - first
    is_local = (local >= 0) & (local < num_local)
    order = torch.argsort(torch.where(is_local, local, num_local), stable=True)[: int(is_local.sum())]
    positions = torch.full_like(local, -1)
    positions[order] = torch.arange(len(order))
    counts = torch.bincount(local[is_local], minlength=num_local)
    return counts.cumsum(0).int(), positions.view_as(ids).int()


def expected_activations(
    h: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, activation: str = "silu", gated: bool = True
) -> torch.Tensor:
    """[num valid rows, I] float64."""
    h = h[: int(offsets[-1])].double()
    if bias is not None:
        h = h + bias.double()[expert_of_rows(offsets)]
    gate, up = h.chunk(2, dim=1) if gated else (h, 1)
    return FUNCTIONS[activation](gate, 1.0) * up


def expert_of_rows(offsets: torch.Tensor) -> torch.Tensor:
    counts = torch.diff(offsets.long(), prepend=torch.zeros(1, dtype=torch.long))
    return torch.repeat_interleave(torch.arange(len(offsets)), counts)


def expected_combine(y, positions, ids, first, weights, bias, *, on_grid=False) -> torch.Tensor:
    """[n, H] float64, one pair at a time; on the grid, products are rounded to float32 and then to multiples of
    2^-32.
    """
    out = torch.zeros(len(positions), y.shape[1], dtype=torch.float64)
    for i in range(len(positions)):
        for k in range(positions.shape[1]):
            if positions[i, k] < 0:
                continue
            value = y[positions[i, k]].float()
            if bias is not None:
                value = value + bias[ids[i, k] - first].float()
            if on_grid:
                out[i] += (value * weights[i, k]).double().mul(2.0**32).round() / 2.0**32
            else:
                out[i] += value.double() * weights[i, k].double()
    return out


def expected_grouped_gemm(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[num valid rows, N] float64."""
    experts = expert_of_rows(offsets)
    return torch.einsum("mk,mnk->mn", x[: len(experts)].double(), w.double()[experts])
