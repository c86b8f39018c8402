"""Mode "auto": every candidate priced and run on the clock, the best by the objective taken.

Deep models are simulated with few layers, twice, and carried on in a straight line: with all layers alike, cohorts that run side
by side finish in proportion to the number of layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipemoe.errors import PlanError
from pipemoe.plan.candidates import CANDIDATES, candidate_microbatches, candidate_name
from pipemoe.plan.compiled import compiled
from pipemoe.plan.cost import CostModel, rates_of, speeds_of
from pipemoe.plan.layer_costs import BUSY, causal_matrix, cut_waves, layer_costs, merge_alike_ranks
from pipemoe.plan.order import order_keys
from pipemoe.plan.schedule import OBJECTIVES, Facts, Microbatch, ModelShape, PlanConfig
from pipemoe.plan.simulator import flat_boundaries
from pipemoe.plan.simulator_core import run_clock
from pipemoe.plan.simulator_rules import NEVER

_FEW_LAYERS, _MORE_LAYERS = 2, 4
_MANY_WAVES = 6  # of all cohorts in a layer: from here on half as many layers say enough
_MARGIN = 50  # thousandths by which a later candidate, mostly of more cohorts, must be better: predictions are not exact


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to form cohorts, and what it is predicted to take, in ns."""

    index: int  # in CANDIDATES
    name: str
    assignment: list[list[Microbatch]]
    mean: int
    slowest: int
    p50: int
    chosen: bool


def auto_assignment(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> list[list[Microbatch]]:
    """Cohorts by cost."""
    return next((c.assignment for c in _evaluate(facts, shape, config, cost, only_chosen=True)), [])


def auto_candidates(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> list[Candidate]:
    """All that were looked at, each once, in order of preference at equal figures; one is `chosen`."""
    return _evaluate(facts, shape, config, cost, only_chosen=False)


def _evaluate(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel, *, only_chosen: bool) -> list[Candidate]:
    if not any(facts.tokens):
        return []
    starts, first = flat_boundaries(facts)
    tokens = np.array(facts.tokens, dtype=np.int64)
    limit, budget = config.max_wave_rows(facts.num_ranks), round(config.makespan_budget * 1000)
    problem = (tokens, starts, first, rates_of(cost), speeds_of(cost.contention), shape.num_experts, shape.top_k, shape.num_layers, limit, config.num_slots)
    figures, best = _search(CANDIDATES, *problem, config.num_buffers, config.combine == "gather", OBJECTIVES.index(config.objective), budget, only_chosen)
    if best < 0:
        raise PlanError("no candidate can be carried out")
    candidates = []
    for index, (mean, slowest, p50) in enumerate(figures.tolist()):
        if slowest == NEVER or (only_chosen and index != best):
            continue
        kind, parts, unit = CANDIDATES[index]
        table = candidate_microbatches(kind, parts, units_of(tokens, starts, first, unit), tokens)
        assignment: list[list[Microbatch]] = [[] for _ in range(table[-1, 0] + 1)]
        for cohort, rank, start, stop in table.tolist():
            assignment[cohort].append(Microbatch(rank, start, stop))
        candidates.append(Candidate(index, candidate_name(index), assignment, mean, slowest, p50, index == best))
    return candidates


@compiled
def units_of(tokens, starts, first, by_sequence):
    """Whole ranks, or sequences: [U, 3] = rank, start, stop."""
    units = np.empty((len(starts), 3), np.int64)
    count = 0
    for r in range(len(tokens)):
        if by_sequence:
            for s in range(first[r], first[r + 1] - 1):
                units[count, 0], units[count, 1], units[count, 2] = r, starts[s], starts[s + 1]
                count += 1
        elif tokens[r]:
            units[count, 0], units[count, 1], units[count, 2] = r, 0, tokens[r]
            count += 1
    return units[:count]


@compiled
def _search(kinds, tokens, starts, first, rates, speeds, num_experts, top_k, num_layers, limit, num_slots, num_buffers, gather, objective, budget, only_chosen):
    """Figures [N, 3] = OBJECTIVES of every candidate (NEVER: does not apply, or is an earlier one again) and the best.

    only_chosen: no time is spent on candidates that take too long for the budget anyway.
    """
    figures = np.full((len(kinds), 3), NEVER, np.int64)
    seen = np.zeros(len(kinds), np.int64)
    many_sequences, lowest = False, NEVER // 4096
    for r in range(len(tokens)):
        many_sequences = many_sequences or first[r + 1] - first[r] > 2
    for k in range(len(kinds)):
        if kinds[k, 2] and not many_sequences:
            continue
        microbatches = candidate_microbatches(kinds[k, 0], kinds[k, 1], units_of(tokens, starts, first, kinds[k, 2]), tokens)
        if len(microbatches) == 0:
            continue
        mark = np.int64(1)
        for m in range(len(microbatches)):
            for j in range(4):
                mark = mark * 1_000_003 + microbatches[m, j]  # wraps around, the same everywhere
        seen[k], again = mark, False
        for j in range(k):
            again = again or seen[j] == mark
        if again:
            continue
        num_cohorts = microbatches[-1, 0] + 1
        segments, wave_rows, num_waves = cut_waves(microbatches, num_cohorts, limit)
        causal = causal_matrix(microbatches, num_cohorts, starts, first)
        costs = layer_costs(segments, wave_rows, num_waves, causal, starts, first, rates, num_experts, top_k, gather, False)
        allowed = lowest + lowest * budget // 1000 if only_chosen else NEVER
        if _least_ns(costs, rates, speeds) * num_layers > allowed:
            continue
        figures[k, 0], figures[k, 1], figures[k, 2] = _predict(costs, rates, speeds, num_layers, num_slots, num_buffers, allowed)
        lowest = min(lowest, figures[k, 1])
    best, allowed = -1, lowest + lowest * budget // 1000
    for k in range(len(kinds)):
        if figures[k, 1] == NEVER or figures[k, 1] > allowed:
            continue
        if best < 0 or figures[k, objective] * (1000 + _MARGIN) // 1000 < figures[best, objective]:
            best = k
    return figures, best


@compiled
def _least_ns(costs, rates, speeds):
    """A layer takes no less: what the busiest rank (or all ranks' cores) has to compute."""
    longest, total = 0, 0
    for r in range(costs.compute.shape[1]):
        busy = 0
        for c in range(len(costs.num_waves)):
            for work in range(1 + costs.num_waves[c]):
                busy += costs.compute[c, r, work, BUSY]
        longest, total = max(longest, busy), total + busy
    if rates.cores_permille:
        return total * 1000 // rates.cores_permille
    together = 1000  # what two computations side by side get done
    for a in range(2):
        for b in range(2):
            together = max(together, speeds[0, a, b] + speeds[1, b, a])
    return longest * 1000 // together


@compiled
def _predict(costs, rates, speeds, num_layers, num_slots, num_buffers, allowed):
    """Mean, largest and median ns to the first token, over sequences; roughly where the largest is far above `allowed`."""
    merged, weight = merge_alike_ranks(costs)
    num_cohorts, num_classes = merged.ends.shape
    slots = np.empty(num_cohorts, np.int64)
    for c in range(num_cohorts):
        slots[c] = c % num_slots
    nothing = np.empty((1, 1, 1, 1), np.int64)
    finish = np.zeros((num_cohorts, num_classes), np.int64)
    num_waves = 0
    for c in range(num_cohorts):
        num_waves += costs.num_waves[c]
    few, more = (1, 2) if num_waves > _MANY_WAVES else (_FEW_LAYERS, _MORE_LAYERS)
    layers, before = num_layers if num_layers <= more else few, 0
    while True:
        keys = order_keys(merged, rates, num_slots, layers)
        ended, _ = run_clock(merged, keys, slots, weight, layers, num_buffers, rates, speeds, nothing, nothing, False)
        slowest = 0
        for c in range(num_cohorts):
            for k in range(num_classes):
                slope = (ended[c, k] - finish[c, k]) * (num_layers - layers) // (layers - before)
                finish[c, k] = ended[c, k] + (slope if before or layers < num_layers else 0)
                slowest = max(slowest, finish[c, k])
        if before or layers == num_layers or slowest * 3 // 4 > allowed:
            break
        for c in range(num_cohorts):
            for k in range(num_classes):
                finish[c, k] = ended[c, k]
        layers, before = more, layers
    total, count, slowest = 0, 0, 0
    for c in range(num_cohorts):
        for k in range(num_classes):
            if merged.ends[c, k]:
                total += merged.ends[c, k] * finish[c, k]
                count += merged.ends[c, k]
                slowest = max(slowest, finish[c, k])
    median = slowest
    for c in range(num_cohorts):
        for k in range(num_classes):
            no_later = 0
            for d in range(num_cohorts):
                for j in range(num_classes):
                    if finish[d, j] <= finish[c, k]:
                        no_later += merged.ends[d, j]
            if 2 * no_later >= count:
                median = min(median, finish[c, k])
    return total // count, slowest, median
