"""A small MoE layer with the same weights on every rank, rows per rank, and the naive oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipemoe.experts import ExpertWeights, local_range

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 96, 48, 7, 3  # awkward on purpose; 7 experts do not divide by any rank count

# Tokens per rank; rank r uses entry r modulo their number. Zero-token ranks, single tokens, more than a wave.
TOKEN_COUNTS = ((37, 0, 5, 120), (0, 0, 3, 0), (1, 1, 1, 1), (64, 64, 64, 64), (0, 0, 0, 0), (130, 2, 0, 1))


@dataclass(frozen=True)
class Layers:
    """All experts of some MoE layers; `local` cuts out one rank's."""

    gate_up: torch.Tensor  # [L, E, 2I, H]
    down: torch.Tensor  # [L, E, H, I]

    def local(self, num_ranks: int, rank: int) -> list[ExpertWeights]:
        own = local_range(NUM_EXPERTS, num_ranks, rank)
        return [
            ExpertWeights(
                g[own.start : own.stop].contiguous(), d[own.start : own.stop].contiguous(), first_expert=own.start
            )
            for g, d in zip(self.gate_up, self.down)
        ]

    def oracle(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Token by token, expert by expert, in float64."""
        y = torch.zeros(x.shape, dtype=torch.float64)
        for t in range(len(x)):
            for e, w in zip(ids[t].tolist(), weights[t].tolist()):
                if e < 0:  # no expert
                    continue
                h = self.gate_up[layer, e].cpu().double() @ x[t].cpu().double()
                y[t] += w * (
                    self.down[layer, e].cpu().double() @ (torch.nn.functional.silu(h[:INTERMEDIATE]) * h[INTERMEDIATE:])
                )
        return y


def make_layers(num_layers: int, device: torch.device, dtype: torch.dtype, *, hidden: int = HIDDEN) -> Layers:
    g = torch.Generator().manual_seed(1)
    gate_up = torch.randn(num_layers, NUM_EXPERTS, 2 * INTERMEDIATE, hidden, generator=g) / hidden**0.5
    down = torch.randn(num_layers, NUM_EXPERTS, hidden, INTERMEDIATE, generator=g) / INTERMEDIATE**0.5
    return Layers(gate_up.to(device, dtype), down.to(device, dtype))


def make_rows(
    num_tokens: int, seed: int, device: torch.device, dtype: torch.dtype, *, hidden: int = HIDDEN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], ids [T, K] without repeats in a row, weights [T, K] float32."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=g)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=g).argsort(dim=1)[:, :TOP_K]
    return x.to(device, dtype), ids.to(device), torch.rand(num_tokens, TOP_K, generator=g).to(device)


def norm_ratio(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, in float64 on the host."""
    if found.is_cuda:  # see PipelinedMoE.step: inside an open step, wait first and then copy
        torch.cuda.current_stream(found.device).synchronize()
    found, wanted = found.cpu().double(), wanted.cpu().double()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
