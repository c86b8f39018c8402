"""A source of made-up rows: a model without attention, whose rows of a layer come from (rank, layer) alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipemoe import Config
from pipemoe.experts import make_experts
from pipemoe.plan.schedule import ModelShape, Plan
from pipemoe.runtime.runtime import Runtime
from pipemoe.runtime.source import SourceTraits
from tests.moe_cases import HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, Layers, make_rows


class RowsSource:
    """`before_attend(cohort, layer)` runs in the compute lane ahead of each attend."""

    has_side_work = keeps_tensors = writes_rows = False

    def __init__(
        self, num_tokens: int, runtime: Runtime, before_attend: Callable[[int, int], None] = lambda cohort, layer: None
    ) -> None:
        world = runtime.world
        self._before = before_attend
        self.inputs = [
            make_rows(num_tokens, 1000 * layer + world.rank, world.device, runtime.dtype)
            for layer in range(runtime.shape.num_layers)
        ]
        self.inputs = [(x, ids.int(), weights) for x, ids, weights in self.inputs]
        self.sums = [
            torch.full((num_tokens, HIDDEN), torch.nan, dtype=runtime.results_dtype, device=world.device)
            for _ in self.inputs
        ]
        self._layer: dict[int, int] = {}
        self.finished_cohorts: list[int] = []
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)

    def begin(self, plan: Plan, rank: int) -> None:
        self.plan = plan

    def ready(self, cohort: int, layer: int) -> bool:
        return True

    def attend(self, cohort: int, layer: int, rows=None) -> None:
        self._before(cohort, layer)
        self._layer[cohort] = layer

    def rows(self, cohort: int, start: int, stop: int):
        return tuple(t[start:stop] for t in self.inputs[self._layer[cohort]])

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        return self.sums[self._layer[cohort]][start:stop]

    def combined(self, cohort: int, layer: int, event) -> None:
        pass

    def finish(self, cohort: int) -> None:
        pass

    def finished(self, cohort: int, seconds: float) -> None:
        self.finished_cohorts.append(cohort)


def make_runtime(world, layers: Layers, **options) -> Runtime:
    config = Config(**{"moe_max_num_tokens": 24, "max_tokens_per_rank": 160, **options})
    weights = layers.local(world.size, world.rank)
    dtype = layers.gate_up.dtype
    experts = make_experts(
        weights, top_k=TOP_K, hidden=HIDDEN, device=world.device, dtype=dtype, deterministic=config.deterministic
    )
    shape = ModelShape(HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K, len(weights))
    return Runtime(world, shape, config, experts, dtype, SourceTraits())
