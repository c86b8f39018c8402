"""simulate(plan, cost): runs the plan on the clock. What it is predicted to take, on every rank, and why."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from pipemoe.errors import PlanError
from pipemoe.plan.clock.clock import run_clock
from pipemoe.plan.clock.layer import COMBINE, DISPATCH, LayerCosts, layer_costs
from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.clock.sms import speeds_where_left
from pipemoe.plan.cost.magnitude import check_magnitude
from pipemoe.plan.cost.model import CostModel, rates_of, speeds_of
from pipemoe.plan.schedule import Op, OpKind, Plan

Interval = tuple[int, int]


@dataclass(frozen=True)
class Prediction:
    """All in ns; None for a rank without sequences. TTFTs from the call, spans from the first operation."""

    ttft: tuple[int | None, ...]  # per rank: its latest sequence
    sequence_ttft: tuple[tuple[int, ...], ...]  # per rank and sequence
    exposed: tuple[int, ...]  # per rank: communication under way and no computation
    spans: tuple[tuple[tuple[Op, Interval], ...], ...]  # per rank, by begin; empty unless asked for

    @property
    def makespan(self) -> int:
        return max((t for t in self.ttft if t is not None), default=0)

    @property
    def mean(self) -> float:
        """Over all sequences."""
        every = [t for of_rank in self.sequence_ttft for t in of_rank]
        return sum(every) / len(every) if every else 0.0


def simulate(plan: Plan, cost: CostModel, *, spans: bool | Collection[int] = False) -> Prediction:
    """Predict `plan`. spans: also when each operation runs, on all ranks or on these.

    Raises PlanError if the plan can never end, which no sound plan does; InputError if it takes longer than int64
    nanoseconds can count.
    """
    num_ranks, num_cohorts, num_layers = plan.facts.num_ranks, len(plan.cohorts), plan.shape.num_layers
    if not plan.cohorts:
        return Prediction((None,) * num_ranks, ((),) * num_ranks, (0,) * num_ranks, ((),) * num_ranks)
    check_magnitude(plan.facts, plan.shape, plan.config, cost)
    costs = costs_of(plan, cost)
    waves = int(costs.num_waves.max())
    keys = np.full((num_cohorts, num_layers * (1 + 3 * waves) + 1), NEVER, np.int64)
    for cohort in range(num_cohorts):
        positions = np.flatnonzero(plan.order[:, 1] == cohort)
        keys[cohort, : len(positions)] = positions
    slots = np.array([c.slot for c in plan.cohorts], dtype=np.int64)
    keep = bool(spans)
    computed = np.zeros((num_cohorts, num_ranks, num_layers * (1 + waves) + 1, 2) if keep else (1, 1, 1, 1), np.int64)
    moved = np.zeros((num_cohorts, 2, num_layers * waves, 2) if keep else (1, 1, 1, 1), np.int64)
    weight = np.ones(num_ranks, np.int64)
    rates = rates_of(cost)
    speeds = speeds_where_left(rates, speeds_of(cost), plan.sms_left, plan.num_slots_used)
    finish, exposed, _ = run_clock(
        costs, keys, slots, weight, num_layers, plan.config.num_buffers, rates, speeds, computed, moved, keep
    )
    if (finish == NEVER).any():
        raise PlanError("simulation: the plan comes to a standstill")
    sequences = tuple(
        tuple(cost.start_ns + int(finish[c, rank]) for c in cohorts) for rank, cohorts in enumerate(_last_cohorts(plan))
    )
    ttft = tuple(max(of_rank, default=None) for of_rank in sequences)
    wanted = range(num_ranks) if spans is True else spans or ()
    found = tuple(_spans(plan, rank, costs, computed, moved) if rank in wanted else () for rank in range(num_ranks))
    return Prediction(ttft, sequences, tuple(exposed.tolist()), found)


def costs_of(plan: Plan, cost: CostModel) -> LayerCosts:
    """A layer of the plan, priced."""
    segments = [
        (c, w, s.rank, s.start, s.stop)
        for c, cohort in enumerate(plan.cohorts)
        for w, wave in enumerate(cohort.waves)
        for s in wave.segments
    ]
    num_waves = np.array([len(cohort.waves) for cohort in plan.cohorts], dtype=np.int64)
    rows = np.zeros((len(num_waves), num_waves.max()), np.int64)
    for c, cohort in enumerate(plan.cohorts):
        rows[c, : num_waves[c]] = [wave.num_rows for wave in cohort.waves]
    starts, first = plan.facts.flat_boundaries
    num_experts, top_k = plan.shape.num_experts, plan.shape.top_k
    table = np.array(segments, dtype=np.int64)
    gather, gathered, left = plan.config.combine == "gather", plan.config.gathered_waves, plan.sms_left
    rates = rates_of(cost)
    return layer_costs(
        table, rows, num_waves, plan.waits, starts, first, rates, num_experts, top_k, gather, gathered, left
    )


def _last_cohorts(plan: Plan) -> list[list[int]]:
    """Per rank and sequence: the cohort that holds its last token."""
    chunks: list[list[tuple[int, int, int]]] = [[] for _ in plan.facts.tokens]
    for c, cohort in enumerate(plan.cohorts):
        for m in cohort.microbatches:
            chunks[m.rank].append((m.start, m.stop, c))
    return [
        [next(c for start, stop, c in of_rank if start < end <= stop) for end in plan.facts.boundaries[rank][1:]]
        for rank, of_rank in enumerate(chunks)
    ]


def _spans(
    plan: Plan, rank: int, costs: LayerCosts, computed: np.ndarray, moved: np.ndarray
) -> tuple[tuple[Op, Interval], ...]:
    spans = []
    for op in plan.ops:
        waves = int(costs.num_waves[op.cohort])
        if op.kind in (OpKind.DISPATCH, OpKind.COMBINE):
            side = DISPATCH if op.kind is OpKind.DISPATCH else COMBINE
            span = moved[op.cohort, side, op.layer * waves + op.wave]
        else:
            place = {OpKind.ATTEND: 0, OpKind.EXPERTS: 1 + op.wave, OpKind.FINISH: 1 + waves}[op.kind]
            span = computed[op.cohort, rank, op.layer * (1 + waves) + place]
        spans.append((op, (int(span[0]), int(span[1]))))
    return tuple(sorted(spans, key=lambda span: (span[1], span[0])))
