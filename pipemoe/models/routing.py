"""The router: logits in, the K experts of every token and their weights out.

Two scorings, as in transformers' own routers (which the tests compare with):

- softmax top-k (Mixtral; Qwen3-MoE, Switch Transformer lineage): probabilities over all experts, the K largest,
  optionally renormalised to sum to one;
- sigmoid with a bias-corrected, group-limited choice (DeepSeek-V3, arXiv:2412.19437, section 2.1.2): the bias and the
  groups decide who is chosen, the unbiased scores are the weights.

On the host the choice is a numba function without the GIL, on CUDA one kernel (pipemoe_kernels.routing); both break
ties towards the lower expert and the lower group. That kernel does not take more than 512 experts, more than 16 of them
per token, or GPUs older than sm_80. There, a handful of torch operations does it, without a host synchronisation; ties
are broken as by torch.topk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipemoe.compiled import Compiled
from pipemoe.errors import ConfigError

if TYPE_CHECKING:
    from pipemoe_kernels.placed_rows import PlacedRows
    from pipemoe_kernels.routing import Scoring

SOFTMAX, SIGMOID = "softmax", "sigmoid"


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """How one model family routes; equal for all of its layers.

    round_weights: round the weights to the logits' dtype, as the family's own router does.
    logits_in_float32: the router's matrix product itself runs in float32.
    """

    num_experts: int
    top_k: int
    scoring: str = SOFTMAX
    renormalise: bool = True
    round_weights: bool = False
    logits_in_float32: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scoring not in (SOFTMAX, SIGMOID):
            raise ConfigError(f"scoring is {self.scoring!r}; it must be {SOFTMAX!r} or {SIGMOID!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}; it must be in [1, {self.num_experts}], the number of experts")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ConfigError(f"num_groups is {self.num_groups}; it must divide the {self.num_experts} experts")
        if not 1 <= self.top_groups <= self.num_groups:
            raise ConfigError(f"top_groups is {self.top_groups}; it must be in [1, {self.num_groups}]")
        if self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise ConfigError(f"num_groups is {self.num_groups}; a group must hold two experts of {self.num_experts}")
        if self.top_groups * (self.num_experts // self.num_groups) < self.top_k:
            raise ConfigError(f"{self.top_groups} groups hold fewer than top_k = {self.top_k} experts")


def route(
    logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts.

    logits [T, E] float32, bfloat16 or float16; bias [E] float32 (sigmoid scoring only), on the same device.
    Returns ids [T, K] int32 in [0, E) and weights [T, K] float32. NaN logits give valid ids and NaN weights.
    """
    if logits.device.type == "cuda" and kernel_takes(logits.device, spec):
        return _route_cuda(logits, spec, bias)
    if logits.device.type == "cpu":
        ids, weights = _route_host(logits, spec, bias)
    elif spec.scoring == SOFTMAX:
        ids, weights = _softmax_torch(logits, spec)
    else:
        ids, weights = _sigmoid_torch(logits, spec, bias)
    if spec.round_weights and logits.dtype != torch.float32:
        weights = weights.to(logits.dtype).float()
    return ids, weights


def kernel_takes(device: torch.device, spec: RoutingSpec) -> bool:
    """Does one kernel route, on this GPU?"""
    from pipemoe_kernels.routing import CAPABILITY, fits

    return fits(spec.num_experts, spec.top_k) and torch.cuda.get_device_capability(device) >= CAPABILITY


def _route_cuda(
    logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.empty((len(logits), spec.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((len(logits), spec.top_k), dtype=torch.float32, device=logits.device)
    route_into(logits, spec, bias, ids, weights)
    return ids, weights


def route_into(
    logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None, ids: torch.Tensor, weights: torch.Tensor
) -> None:
    """`route` on a GPU, where kernel_takes, into tensors of which rows may be strided."""
    from pipemoe_kernels.launch.kernel import Stream
    from pipemoe_kernels.routing import route_tokens

    route_tokens(Stream.current(logits.device), logits, bias, ids, weights, *_kernel_settings(spec))


def route_into_placed(
    logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None, rows: PlacedRows, weights_offset: int
) -> None:
    """`route` on a GPU, where kernel_takes, into wire rows whose place is read when the kernel runs."""
    from pipemoe_kernels.launch.kernel import Stream
    from pipemoe_kernels.routing import route_placed_tokens

    stream = Stream.current(logits.device)
    route_placed_tokens(stream, logits, bias, spec.top_k, rows, weights_offset, *_kernel_settings(spec))


def _kernel_settings(spec: RoutingSpec) -> tuple[Scoring, int, int]:
    from pipemoe_kernels.routing import Scoring

    scoring = Scoring(spec.scoring == SIGMOID, spec.renormalise, spec.round_weights, spec.scale)
    return scoring, *((spec.num_groups, spec.top_groups) if spec.scoring == SIGMOID else (1, 1))


def _softmax_torch(logits: torch.Tensor, spec: RoutingSpec) -> tuple[torch.Tensor, torch.Tensor]:
    if spec.renormalise:  # a softmax over the chosen logits is the renormalised softmax over all
        top, ids = torch.topk(logits, spec.top_k, dim=-1)
        weights = torch.softmax(top, dim=-1, dtype=torch.float32)
    else:
        weights, ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), spec.top_k, dim=-1)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return ids.to(torch.int32), weights


def _sigmoid_torch(
    logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits.float().sigmoid()
    choice = scores if bias is None else scores + bias
    if spec.top_groups < spec.num_groups:
        grouped = choice.view(len(logits), spec.num_groups, -1)  # [T, G, E/G]
        group_scores = grouped.topk(2, dim=-1)[0].sum(dim=-1)
        chosen = torch.topk(group_scores, spec.top_groups, dim=-1, sorted=False)[1]
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, chosen, False)
        choice = grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).view_as(choice)
    ids = torch.topk(choice, spec.top_k, dim=-1)[1]
    weights = scores.gather(1, ids)
    if spec.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    if spec.scale != 1.0:
        weights = weights * spec.scale
    return ids.to(torch.int32), weights


def _route_host(
    logits: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values = logits.float().contiguous().numpy()
    ids = np.empty((len(values), spec.top_k), np.int32)
    weights = np.empty((len(values), spec.top_k), np.float32)
    if spec.scoring == SOFTMAX:
        softmax_top_k(values, spec.renormalise, spec.scale, ids, weights)
    else:
        bias_values = np.zeros(spec.num_experts, np.float32) if bias is None else bias.numpy()
        sigmoid_top_k(values, bias_values, spec.num_groups, spec.top_groups, spec.renormalise, spec.scale, ids, weights)
    return torch.from_numpy(ids), torch.from_numpy(weights)


@functools.partial(Compiled, inside=True, nogil=True)
def _take_largest(scores, taken, chosen):  # pragma: no cover (compiled)
    """Fill `chosen` with the positions of the largest scores that are not yet `taken`, largest first; mark them taken.

    NaN loses to every number; when only NaN is left the lowest free position is chosen, so every position is valid.
    """
    for k in range(len(chosen)):
        best = -1
        for e in range(len(scores)):
            if taken[e]:
                continue
            if best < 0 or scores[e] > scores[best] or (np.isnan(scores[best]) and not np.isnan(scores[e])):
                best = e
        taken[best] = True
        chosen[k] = best


@functools.partial(Compiled, what="the router of the host", nogil=True)
def softmax_top_k(logits, renormalise, scale, ids, weights):  # pragma: no cover (compiled)
    num_tokens, num_experts = logits.shape
    top_k = ids.shape[1]
    taken = np.empty(num_experts, np.bool_)
    for t in range(num_tokens):
        row = logits[t]
        taken[:] = False
        _take_largest(row, taken, ids[t])
        top = row[ids[t, 0]]
        total = np.float32(0)
        for e in range(num_experts):
            total += np.exp(row[e] - top)
        chosen_total = np.float32(0)
        for k in range(top_k):
            weights[t, k] = np.exp(row[ids[t, k]] - top) / total
            chosen_total += weights[t, k]
        for k in range(top_k):
            if renormalise:
                weights[t, k] /= chosen_total
            weights[t, k] *= np.float32(scale)


@functools.partial(Compiled, what="the router of the host", nogil=True)
def sigmoid_top_k(
    logits, bias, num_groups, top_groups, renormalise, scale, ids, weights
):  # pragma: no cover (compiled)
    num_tokens, num_experts = logits.shape
    top_k = ids.shape[1]
    group_size = num_experts // num_groups
    scores = np.empty(num_experts, np.float32)
    choice = np.empty(num_experts, np.float32)
    taken = np.empty(num_experts, np.bool_)
    group_scores = np.empty(num_groups, np.float32)
    group_taken = np.empty(num_groups, np.bool_)
    groups = np.empty(top_groups, np.int32)
    best_two = np.empty(2, np.int32)
    for t in range(num_tokens):
        for e in range(num_experts):
            scores[e] = np.float32(1) / (np.float32(1) + np.exp(-logits[t, e]))
            choice[e] = scores[e] + bias[e]
        taken[:] = False
        if top_groups < num_groups:
            for g in range(num_groups):
                members = choice[g * group_size : (g + 1) * group_size]
                _take_largest(members, taken[:group_size], best_two)
                taken[:group_size] = False
                group_scores[g] = members[best_two[0]] + members[best_two[1]]
            group_taken[:] = False
            _take_largest(group_scores, group_taken, groups)
            taken[:] = True
            for g in groups:
                taken[g * group_size : (g + 1) * group_size] = False
        _take_largest(choice, taken, ids[t])
        total = np.float32(1e-20)
        for k in range(top_k):
            weights[t, k] = scores[ids[t, k]]
            total += weights[t, k]
        for k in range(top_k):
            if renormalise:
                weights[t, k] /= total
            weights[t, k] *= np.float32(scale)
