"""How a model's router spreads tokens over its experts, counted from the rows of a real step.

Needs only torch, so that it also counts in older versions of pipemoe.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pipemoe import Model

# Where a runtime keeps its experts, in this version and in older ones.
_PLACES = ("experts_with_free_sms", "experts_leaving")


def expected_active(num_experts: int, top_k: int, num_tokens: int) -> float:
    """Experts that `num_tokens` tokens hit if each takes `top_k` of them uniformly: E (1 - (1 - K/E)^T)."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


class ExpertLoads:
    """Tokens of each expert in each MoE layer."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        # The last column takes the ids -1 of padding.
        self._counts = torch.zeros((num_layers, num_experts + 1), dtype=torch.long, device=device)

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """ids: [n, K], -1 for no expert. Enqueued on the current stream."""
        places = ids.flatten().long()
        places = torch.where(places < 0, self._counts.shape[1] - 1, places)
        self._counts[layer].scatter_add_(0, places, torch.ones_like(places))

    def counts(self) -> torch.Tensor:
        """[L, E] on the host. Waits for the device."""
        if self._counts.is_cuda:
            torch.cuda.synchronize(self._counts.device)
        return self._counts[:, :-1].cpu()

    @property
    def active_experts(self) -> float:
        """Experts with any token, mean over layers."""
        return float((self.counts() > 0).sum(-1).float().mean())

    @property
    def max_over_mean(self) -> float | None:
        """The busiest expert's tokens over an expert's mean, mean over layers. None if there are no tokens."""
        counts = self.counts().double()
        return float((counts.amax(-1) / counts.mean(-1)).mean()) if counts.any() else None

    def figures(self) -> dict[str, float | None]:
        """As a results row has them. Both None if nothing was counted."""
        load = self.max_over_mean
        return {
            "active_experts": None if load is None else self.active_experts,
            "expert_load_max_over_mean": load,
        }


class _Counting:
    """Experts that count the rows they are called with. All else is the experts' own."""

    def __init__(self, experts: Any, loads: ExpertLoads) -> None:
        self._experts, self._loads = experts, loads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)

    def __call__(self, layer: int, rows: Any, *arguments: Any) -> None:
        for _, piece in getattr(rows, "pieces", [(0, rows)]):  # ranks that share memory have them scattered
            self._loads.add(layer, piece.ids)
        self._experts(layer, rows, *arguments)


@contextmanager
def counted(model: Model) -> Iterator[ExpertLoads]:
    """Count the tokens of all ranks' rows in the steps of this context, which must be given a `timeline`: only then is
    every call made anew. Every rank may count, and finds the same.
    """
    shape, runtime = model.decoder.shape, model.runtime
    loads = ExpertLoads(shape.num_layers, shape.num_experts, model.world.device)
    loads.counts()  # zeroed on another stream than the lanes'
    place = next(name for name in _PLACES if hasattr(runtime, name))
    experts = getattr(runtime, place)
    setattr(runtime, place, {num_sms: _Counting(e, loads) for num_sms, e in experts.items()})
    try:
        yield loads
    finally:
        setattr(runtime, place, experts)
