"""The cells of the kernel benchmark: models' layers on one rank, and a wave's rows with uniform routing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from pipemoe.experts import ExpertWeights
    from pipemoe.models.routing import RoutingSpec
    from pipemoe.wire import WireRows

TOKENS = (64, 512, 4096, 16384)
SEEDS = 40  # routings tried, to find one with the expected number of local pairs


@dataclass(frozen=True)
class Layer:
    """One MoE layer; this rank has its experts [0, num_local_experts)."""

    hidden: int
    intermediate: int
    num_experts: int
    num_local_experts: int
    top_k: int

    @property
    def expert_bytes(self) -> int:
        """bfloat16 weights of one expert."""
        return 2 * 3 * self.hidden * self.intermediate

    @property
    def routing(self) -> RoutingSpec:
        """How models of such layers route: with 256 experts as DeepSeek-V3, with fewer as Qwen3-MoE and Mixtral."""
        from pipemoe.models.routing import SIGMOID, RoutingSpec

        if self.num_experts < 256:
            return RoutingSpec(self.num_experts, self.top_k, round_weights=self.num_experts > 8)
        groups = {"num_groups": 8, "top_groups": 4, "scale": 2.5, "logits_in_float32": True}
        return RoutingSpec(self.num_experts, self.top_k, scoring=SIGMOID, **groups)


LAYERS = {
    "deepseek-v3": Layer(7168, 2048, 256, 32, 8),
    "qwen3-30b-a3b": Layer(2048, 768, 128, 16, 8),
    "qwen3-30b-a3b-all": Layer(2048, 768, 128, 128, 8),
    "mixtral-8x7b-1of8": Layer(4096, 14336, 8, 1, 2),
    "mixtral-8x7b-all": Layer(4096, 14336, 8, 8, 2),
    "qwen3-235b-a22b": Layer(4096, 1536, 128, 16, 8),
}


def enumerate_cells(layers: list[str], tokens: list[int]) -> Iterator[tuple[str, Layer, int]]:
    for name in layers:
        for num_tokens in tokens:
            yield name, LAYERS[name], num_tokens


def make_weights(layer: Layer, device: torch.device) -> ExpertWeights:
    """Random weights that keep the variance of what passes through."""
    import torch

    from pipemoe.experts import ExpertWeights

    def normal(rows: int, columns: int) -> torch.Tensor:
        matrix = torch.empty((layer.num_local_experts, rows, columns), dtype=torch.bfloat16, device=device)
        for expert in matrix:  # one at a time: the generator works in float32
            expert.normal_(std=columns**-0.5)
        return matrix

    return ExpertWeights(normal(2 * layer.intermediate, layer.hidden), normal(layer.hidden, layer.intermediate))


def make_rows(layer: Layer, num_tokens: int, device: torch.device) -> WireRows:
    """Wire rows with as many local pairs as uniform routing gives on average, as nearly as SEEDS routings allow."""
    import torch

    from pipemoe.wire import WireFormat

    def route(seed: int) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        scores = torch.rand((num_tokens, layer.num_experts), generator=generator, device=device)
        return scores.topk(layer.top_k).indices.int()

    expected = num_tokens * layer.top_k * layer.num_local_experts // layer.num_experts
    seed = min(range(SEEDS), key=lambda s: abs(int((route(s) < layer.num_local_experts).sum()) - expected))
    wire = WireFormat(layer.hidden, layer.top_k, torch.bfloat16)
    rows = wire.rows(torch.zeros((num_tokens, wire.row_bytes), dtype=torch.uint8, device=device))
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn((num_tokens, layer.hidden), generator=generator, device=device)
    weights = torch.rand((num_tokens, layer.top_k), generator=generator, device=device)
    rows.write(hidden.bfloat16(), route(seed), weights)
    return rows


def expected_rows(rows: WireRows, weights: ExpertWeights, sample: torch.Tensor) -> torch.Tensor:
    """The result of the tokens `sample`, in float64 on the device."""
    import torch

    x, ids, router = rows.hidden[sample].double(), rows.ids[sample], rows.weights[sample].double()
    out = torch.zeros_like(x)
    for expert in range(weights.num_local_experts):
        token, k = torch.nonzero(ids == expert + weights.first_expert, as_tuple=True)
        if len(token):
            gate, up = (x[token] @ weights.gate_up[expert].double().T).chunk(2, dim=1)
            y = (torch.nn.functional.silu(gate) * up) @ weights.down[expert].double().T
            out.index_add_(0, token, y * router[token, k][:, None])
    return out
