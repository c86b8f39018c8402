"""The naive oracle of the experts call, and generators of its cases."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from pipemoe.experts import ExpertWeights, local_range
from pipemoe.wire import WireFormat, WireRows

FIELDS = ("gate_up", "down", "gate_up_bias", "down_bias")
FUNCTIONS = {
    "silu": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "gelu": lambda x, _: torch.nn.functional.gelu(x),
    "relu": lambda x, _: torch.relu(x),
    "gelu_tanh": lambda x, _: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu2": lambda x, _: torch.relu(x) ** 2,
}
# Of GPT-OSS (with a limit low enough to matter in tests), of DeepSeek-V4, and one without a gate.
CLAMPED = {"limit": 0.75, "alpha": 1.702, "up_offset": 1.0}
GATINGS = [CLAMPED, {"limit": 0.5}, {"activation": "relu2", "gated": False, "limit": 0.25}]


@dataclass(frozen=True)
class Case:
    """One experts call: rows, and all experts' weights of one layer."""

    rows: WireRows
    weights: ExpertWeights  # all E experts

    def split(self, num_ranks: int) -> list[ExpertWeights]:
        """The weights that each of `num_ranks` ranks holds, copied as a rank would hold them."""
        return [
            slice_experts(self.weights, local_range(self.weights.num_local_experts, num_ranks, rank))
            for rank in range(num_ranks)
        ]


def slice_experts(weights: ExpertWeights, experts: range) -> ExpertWeights:
    return _mapped(weights, lambda t: t[experts.start : experts.stop].clone(), first_expert=experts.start)


def to_device(weights: ExpertWeights, device: str) -> ExpertWeights:
    return _mapped(weights, lambda t: t.to(device))


def _mapped(weights: ExpertWeights, change, **other) -> ExpertWeights:
    return replace(weights, **{name: change(tensor) for name, tensor in weights.tensors()}, **other)


def _fields(weights: ExpertWeights):
    return [getattr(weights, name) for name in FIELDS]


def random_weights(
    num_experts,
    hidden,
    intermediate,
    *,
    dtype=torch.float32,
    bias=False,
    seed=0,
    first_expert=0,
    activation="silu",
    gated=True,
    **gating,
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * intermediate if gated else intermediate

    def normal(*shape, scale):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return ExpertWeights(
        normal(num_experts, rows, hidden, scale=hidden**-0.5),
        normal(num_experts, hidden, intermediate, scale=intermediate**-0.5),
        normal(num_experts, rows, scale=0.5) if bias else None,
        normal(num_experts, hidden, scale=0.5) if bias else None,
        first_expert,
        activation,
        gated,
        **gating,
    )


def make_rows(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, device: str = "cpu") -> WireRows:
    """Wire rows of hidden [n, H], ids [n, K], weights [n, K]; the padding holds rubbish, as a reused buffer would."""
    wire = WireFormat(hidden.shape[1], ids.shape[1], hidden.dtype)
    rows = wire.rows(torch.full((len(hidden), wire.row_bytes), 0xAB, dtype=torch.uint8, device=device))
    rows.write(hidden.to(device), ids.int().to(device), weights.float().to(device))
    return rows


def random_rows(
    num_rows, hidden, num_experts, top_k, *, dtype=torch.float32, seed=0, device="cpu", ids=None
) -> WireRows:
    """Rows with distinct experts where there are enough of them; about one id in eight is -1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    if ids is None:
        scores = torch.rand(num_rows, max(num_experts, top_k), generator=generator)
        ids = scores.argsort(dim=1)[:, :top_k] % max(num_experts, 1)
        ids[torch.rand(num_rows, top_k, generator=generator) < 0.125] = -1
    return make_rows(x, ids, torch.rand(num_rows, top_k, generator=generator), device)


def expected(rows: WireRows, weights: ExpertWeights) -> torch.Tensor:
    """The definition, one (token, k) at a time in float64, where the rows are -> [n, H] float64 on the CPU."""
    hidden, ids, router = rows.hidden.double(), rows.ids.tolist(), rows.weights.double()
    out = torch.zeros(len(rows), hidden.shape[1], dtype=torch.float64, device=hidden.device)
    wide = {}  # local expert -> its weights in float64
    for i in range(len(rows)):
        for k in range(len(ids[i])):
            expert = ids[i][k] - weights.first_expert
            if not 0 <= expert < weights.num_local_experts:
                continue
            if expert not in wide:
                wide[expert] = [None if t is None else t[expert].double().to(hidden.device) for t in _fields(weights)]
            gate_up, down, gate_up_bias, down_bias = wide[expert]
            h = gate_up @ hidden[i]
            if gate_up_bias is not None:
                h = h + gate_up_bias
            gate, up = h[: weights.intermediate], h[weights.intermediate :]
            if weights.limit is not None:
                gate, up = gate.clamp(max=weights.limit), up.clamp(-weights.limit, weights.limit)
            a = FUNCTIONS[weights.activation](gate, weights.alpha)
            if weights.gated:
                a = a * (up + weights.up_offset)
            y = down @ a
            if down_bias is not None:
                y = y + down_bias
            out[i] += router[i, k] * y
    return out.cpu()


def relative_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm ratio; 0 when both are zero."""
    difference = (actual.double().cpu() - wanted).norm()
    return float(difference / wanted.norm()) if wanted.norm() > 0 else float(difference)


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
