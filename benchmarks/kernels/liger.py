"""liger-kernel's fused MoE as a peer of the kernel benchmark: an option, used where the package is installed.

It takes rows whose experts are all local, and its index synchronises the host. So its index is made beforehand and not
timed, as for the loop over experts. If some experts are not local, every local pair goes in as a row with one expert:
its kernels gather such rows as usual, and torch adds up the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipemoe.experts import ExpertWeights
    from pipemoe.wire import WireRows

# Of its 32 and 40 configurations, (BLOCK_N, BLOCK_K, warps, stages) and (BLOCK_H, BLOCK_K, warps, stages): compiling
# all of them for every size takes many minutes. The best of these is found anew for every cell.
GEMM_CONFIGS = ((128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 4))
SUM_CONFIGS = ((512, 8, 4, 4), (512, 1, 4, 4))
TUNING_MS = 10


def is_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def _limit_tuning() -> None:
    """Fewer configurations, shorter trials, and none remembered from another cell."""
    import triton
    from liger_kernel.ops import fused_moe_kernels as kernels

    def trial(call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        return triton.testing.do_bench(call, warmup=2, rep=TUNING_MS, quantiles=quantiles)

    names = {"_fused_up_proj_swiglu_kernel": "BLOCK_N", "_fused_down_proj_kernel": "BLOCK_N"}
    names["_token_gather_weighted_sum_kernel"] = "BLOCK_H"
    for name, columns in names.items():
        kernel = getattr(kernels, name)
        sizes = GEMM_CONFIGS if columns == "BLOCK_N" else SUM_CONFIGS
        kernel.configs = [
            triton.Config({columns: n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
            for n, k, warps, stages in sizes
        ]
        kernel.do_bench = trial
        kernel.cache.clear()


def liger(weights: ExpertWeights, rows: WireRows) -> Callable[[torch.Tensor], None]:
    """Its forward pass as a function of `out` that only enqueues."""
    from liger_kernel.ops import fused_moe

    _limit_tuning()
    top_k = rows.ids.shape[1]
    local = rows.ids - weights.first_expert
    is_local = (local >= 0) & (local < weights.num_local_experts)
    x = rows.hidden.contiguous()
    arguments = (x, weights.gate_up.detach(), weights.down.detach())
    index = fused_moe.compute_routing_metadata  # replaced while it runs, for the index made here
    if bool(is_local.all()):
        ids, router, tokens = local.contiguous(), rows.weights.contiguous(), None
        made = index(ids, weights.num_local_experts)
    else:
        places = is_local.flatten().nonzero().flatten()
        tokens = places // top_k
        ids, router = (
            local.flatten()[places][:, None].contiguous(),
            rows.weights.flatten()[places][:, None].contiguous(),
        )
        made = list(index(ids, weights.num_local_experts))
        made[2] = tokens[made[2].long()].int()  # the rows that it gathers

    def call(out: torch.Tensor) -> None:
        fused_moe.compute_routing_metadata = lambda *_: made
        try:
            with torch.no_grad():
                y = fused_moe.LigerFusedMoEFunction.apply(*arguments, ids, router)
        finally:
            fused_moe.compute_routing_metadata = index
        if tokens is None:
            out.copy_(y)
        else:
            out.zero_().index_add_(0, tokens, y)

    return call
