"""Parts of a layer that the kernel benchmark times by themselves: the router's choice, and the index of a wave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.cases import Layer
from pipemoe.models.routing import route
from pipemoe_kernels.index.hopper import MAX_BLOCKS, index_local_pairs
from pipemoe_kernels.launch.kernel import Stream

if TYPE_CHECKING:
    from pipemoe.experts import ExpertWeights
    from pipemoe.wire import WireRows


def routing_work(layer: Layer, num_tokens: int) -> Callable[[], None]:
    """From random router logits to ids and weights, as the model's family routes."""
    spec = layer.routing
    logits = torch.randn((num_tokens, layer.num_experts), device="cuda")
    if not spec.logits_in_float32:
        logits = logits.bfloat16()
    bias = torch.randn(layer.num_experts, device="cuda") / 8 if spec.num_groups > 1 else None
    return lambda: route(logits, spec, bias)


def index_work(weights: ExpertWeights, rows: WireRows) -> Callable[[], None]:
    """The sorted order of a wave's pairs."""
    num_local, num_pairs = weights.num_local_experts, rows.ids.numel()
    sizes = (MAX_BLOCKS * num_local, num_local, num_pairs, num_pairs)
    counts, offsets, positions, tokens = (torch.empty(size, dtype=torch.int32, device="cuda") for size in sizes)
    positions = positions.view(rows.ids.shape)
    return lambda: index_local_pairs(
        Stream.current(rows.buffer.device),
        rows.ids,
        weights.first_expert,
        num_local,
        counts,
        offsets,
        positions,
        tokens,
    )
