"""The implementations that the kernel benchmark compares, each a function of (rows, out) that only enqueues."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from benchmarks.kernels.liger import liger
from pipemoe.experts import ExpertWeights, make_experts
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    from pipemoe.wire import WireRows

Call = Callable[[torch.Tensor], None]


def experts_call(implementation: str, weights: ExpertWeights, rows: WireRows, num_experts: int | None = None) -> Call:
    """pipemoe's experts call in one of its implementations; rows are converted for it beforehand."""
    experts = make_experts(
        [weights],
        top_k=rows.ids.shape[1],
        hidden=weights.hidden,
        device=rows.buffer.device,
        dtype=torch.bfloat16,
        implementation=implementation,
        num_experts=num_experts,
    )
    scratch = experts.new_scratch(len(rows))
    if experts.wire_dtype != rows.hidden.dtype:
        wire = WireFormat(weights.hidden, rows.ids.shape[1], experts.wire_dtype)
        written = wire.rows(torch.zeros((len(rows), wire.row_bytes), dtype=torch.uint8, device=rows.buffer.device))
        written.write(rows.hidden, rows.ids, rows.weights)
        rows = written
    return lambda out: experts(0, rows, out, scratch)


def hopper_call(weights: ExpertWeights, rows: WireRows, *, tile_rows: int) -> Call:
    """pipemoe's "hopper" implementation with row tiles of `tile_rows` rows."""
    from pipemoe.experts.hopper import HopperExperts

    settings = {
        "top_k": rows.ids.shape[1],
        "hidden": weights.hidden,
        "device": rows.buffer.device,
        "dtype": torch.bfloat16,
    }
    experts = HopperExperts([weights], **settings, tile_rows=tile_rows)
    scratch = experts.new_scratch(len(rows))
    return lambda out: experts(0, rows, out, scratch)


def cublas_loop(weights: ExpertWeights, rows: WireRows) -> Call:
    """One expert after the other through torch.mm. Each expert's rows are found beforehand, and not timed."""
    local = rows.ids.flatten().long() - weights.first_expert
    is_local = (local >= 0) & (local < weights.num_local_experts)
    order = torch.argsort(torch.where(is_local, local, weights.num_local_experts), stable=True)[: int(is_local.sum())]
    tokens = order // rows.ids.shape[1]
    counts = torch.bincount(local[is_local], minlength=weights.num_local_experts).tolist()

    def call(out: torch.Tensor) -> None:
        x = rows.hidden.index_select(0, tokens)
        y = torch.empty_like(x)
        begin = 0
        for expert, count in enumerate(counts):
            if count:
                part = slice(begin, begin + count)
                gate, up = torch.mm(x[part], weights.gate_up[expert].T).chunk(2, dim=1)
                torch.mm(torch.nn.functional.silu(gate).mul_(up), weights.down[expert].T, out=y[part])
                begin += count
        router = rows.weights.flatten()[order]
        out.zero_().index_add_(0, tokens, y.mul_(router[:, None].bfloat16()))

    return call


# Name in the results -> maker of the call, from weights, rows and the number of all ranks' experts.
PEERS: dict[str, Callable[[ExpertWeights, WireRows, int], Call]] = {
    "pipemoe": lambda weights, rows, num_experts: experts_call("auto", weights, rows, num_experts),
    "pipemoe_128": lambda weights, rows, _: hopper_call(weights, rows, tile_rows=128),
    "pipemoe_192": lambda weights, rows, _: hopper_call(weights, rows, tile_rows=192),
    "pipemoe_256": lambda weights, rows, _: hopper_call(weights, rows, tile_rows=256),
    "pipemoe_fp8": lambda weights, rows, _: experts_call("hopper_fp8", weights, rows),
    "ampere": lambda weights, rows, _: experts_call("ampere", weights, rows),
    "grouped_mm": lambda weights, rows, _: experts_call("torch", weights, rows),
    "cublas_loop": lambda weights, rows, _: cublas_loop(weights, rows),
    "liger": lambda weights, rows, _: liger(weights, rows),
}
