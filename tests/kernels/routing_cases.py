"""Cases and the per-token oracle of the routing kernel, shared by the simulator and the GPU tests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipemoe_kernels.routing import Scoring


@dataclass(frozen=True)
class RoutingCase:
    num_experts: int
    top_k: int
    scoring: Scoring
    num_groups: int = 1
    top_groups: int = 1
    has_bias: bool = False


CASES = {
    "qwen3": RoutingCase(128, 8, Scoring(sigmoid=False, renormalise=True, rounded=True)),
    "qwen3, not renormalised": RoutingCase(128, 8, Scoring(sigmoid=False, renormalise=False)),
    "mixtral": RoutingCase(8, 2, Scoring(sigmoid=False, renormalise=True)),
    "deepseek-v3": RoutingCase(256, 8, Scoring(sigmoid=True, renormalise=True, scale=2.5), 8, 4, has_bias=True),
    "one expert": RoutingCase(1, 1, Scoring(sigmoid=False, renormalise=True)),
    "most experts": RoutingCase(512, 16, Scoring(sigmoid=True, renormalise=False), has_bias=True),
    "awkward": RoutingCase(45, 7, Scoring(sigmoid=True, renormalise=True), 9, 3),
    "groups of 32": RoutingCase(96, 5, Scoring(sigmoid=True, renormalise=True), 3, 2, has_bias=True),
    "groups of 48": RoutingCase(144, 4, Scoring(sigmoid=True, renormalise=False), 3, 2),
    "many groups": RoutingCase(512, 16, Scoring(sigmoid=True, renormalise=True), 256, 8, has_bias=True),
    "all experts": RoutingCase(13, 13, Scoring(sigmoid=False, renormalise=True, scale=0.5)),
}


def make_logits(case: RoutingCase, num_tokens: int, dtype: torch.dtype, *, ties: bool, seed: int = 0):
    """logits [T, E], and bias [E] or None. ties: many equal logits, and rows of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((num_tokens, case.num_experts), generator=generator) * 2
    bias = torch.randn(case.num_experts, generator=generator) * 0.1
    if ties:
        logits, bias = logits.round(), (bias * 5).round() / 4
        logits[::5] = -0.0
        logits[::5, ::3] = 0.0
    return logits.to(dtype), bias if case.has_bias else None


def take_largest(values: list[float], count: int) -> list[int]:
    """Places of the largest values; NaN after all numbers, lower places first."""
    order = sorted(
        range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i] if values[i] == values[i] else 0.0, i)
    )
    return order[:count]


def expected_routing(
    logits: torch.Tensor, bias: torch.Tensor | None, case: RoutingCase
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T, K]; weights [T, K] float64, not rounded; clear [T]: no two different choices are so close that float32
    may swap them.
    """
    found_ids, found_weights, clear = [], [], []
    for row in logits.double():
        scores = row.sigmoid() if case.scoring.sigmoid else row
        choices = (scores if bias is None else scores + bias.double()).tolist()
        size = case.num_experts // case.num_groups
        if case.top_groups < case.num_groups:
            groups = [choices[g * size : (g + 1) * size] for g in range(case.num_groups)]
            sums = [sum(group[i] for i in take_largest(group, 2)) for group in groups]
            kept = take_largest(sums, case.top_groups)
            is_clear = _is_clear(sums)
        else:
            kept, is_clear = range(case.num_groups), True
        allowed = [expert for expert in range(case.num_experts) if expert // size in kept]
        ids = [allowed[i] for i in take_largest([choices[expert] for expert in allowed], case.top_k)]
        if case.scoring.sigmoid:
            weights = scores[ids]
        else:
            weights = torch.exp(row[ids] - row[ids[0]]) / torch.exp(row - row[ids[0]]).sum()
        if case.scoring.renormalise:
            weights = weights / weights.sum()
        found_ids.append(ids)
        found_weights.append(weights * case.scoring.scale)
        clear.append(is_clear and _is_clear(choices))
    return torch.tensor(found_ids).int(), torch.stack(found_weights), torch.tensor(clear)


def _is_clear(values: list[float]) -> bool:
    ordered = sorted(value for value in values if math.isfinite(value))
    return all(b == a or b - a > 2e-6 for a, b in zip(ordered, ordered[1:]))


def check_routing(ids, weights, logits, bias, case: RoutingCase) -> None:
    """Compare a result with the oracle; weights of 16-bit logits are rounded if the case says so."""
    wanted_ids, wanted_weights, clear = expected_routing(logits, bias, case)
    assert clear.float().mean() > 0.2 or len(clear) < 8
    assert torch.equal(ids[clear], wanted_ids[clear])
    rounded = case.scoring.rounded and logits.dtype != torch.float32
    tolerance = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[logits.dtype] if rounded else 2e-6
    torch.testing.assert_close(
        weights[clear].double(), wanted_weights[clear], rtol=tolerance, atol=1e-7, equal_nan=True
    )
    if rounded:
        assert torch.equal(weights, weights.to(logits.dtype).float())
