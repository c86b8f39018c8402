"""Mode "auto": every candidate priced and run on the clock, the best by the objective taken (auto_search.py,
auto_figures.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipemoe.errors import PlanError
from pipemoe.plan.auto.candidates import CANDIDATES, candidate_name
from pipemoe.plan.auto.search import in_one_slot, microbatches_of, search, try_forms
from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.clock.sms import forced_sms_left
from pipemoe.plan.config import OBJECTIVES, PlanConfig
from pipemoe.plan.cost.magnitude import check_magnitude
from pipemoe.plan.cost.model import CostModel, rates_of, speeds_of
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to form cohorts, and what it is predicted to take, in ns."""

    index: int  # in CANDIDATES
    name: str
    assignment: list[list[Microbatch]]
    num_column_blocks: int
    arrivals: bool
    sms_left: int
    mean: int
    slowest: int
    p50: int
    chosen: bool


def auto_assignment(
    facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel
) -> tuple[list[list[Microbatch]], int, bool, int]:
    """Cohorts, the number of blocks of columns, whether waves are computed as they arrive, and multiprocessors that the
    experts leave, by cost."""
    found = _evaluate(facts, shape, config, cost, only_chosen=True)[0]
    if not found:
        return [], config.combine_blocks or 1, False, forced_sms_left(config, cost.sms) or 0
    return found[0].assignment, found[0].num_column_blocks, found[0].arrivals, found[0].sms_left


def auto_candidates(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> list[Candidate]:
    """All there are, each once, in order of preference at equal figures; one is `chosen`. The best ones come again in
    another form, and with other numbers of multiprocessors left."""
    check_magnitude(facts, shape, config, cost)
    return _evaluate(facts, shape, config, cost, only_chosen=False)[0]


def auto_effort(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> int:
    """Events on the simulator's clock that choosing takes."""
    return _evaluate(facts, shape, config, cost, only_chosen=True)[1]


def _evaluate(
    facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel, *, only_chosen: bool
) -> tuple[list[Candidate], int]:
    if not any(facts.tokens):
        return [], 0
    starts, first = facts.flat_boundaries
    tokens = np.array(facts.tokens, dtype=np.int64)
    goal = np.zeros(5, np.int64)  # weights of mean, slowest, p50; the budget; cohorts of similar ranks
    if config.objective == "weighted":
        goal[:3] = config.objective_weights
    else:
        goal[OBJECTIVES.index(config.objective)] = 1
    goal[3], goal[4] = round(config.makespan_budget * 1000), config.pipelined_ratio
    sms_left = forced_sms_left(config, cost.sms)
    most_rows, forced = config.max_wave_rows(facts.num_ranks), -1 if sms_left is None else sms_left
    limits = np.array(
        [shape.num_layers, most_rows, config.num_slots, config.num_buffers, config.combine == "gather", forced]
    )
    forms = _forms(facts, shape, config, cost)
    problem = (
        tokens,
        starts,
        first,
        rates_of(cost),
        speeds_of(cost),
        shape.num_experts,
        shape.top_k,
        limits.astype(np.int64),
        goal,
    )
    figures, lefts, margins, there, best, lowest, events, rest = search(
        CANDIDATES, np.array(forms), *problem, only_chosen
    )
    if best[0] < 0:
        raise PlanError("no candidate can be carried out")
    if len(forms) > 1 or cost.sms.num_sms:  # where there is nothing to try, its code is not even compiled
        best, events = try_forms(
            CANDIDATES, np.array(forms), *problem, figures, lefts, margins, there, best, lowest, events
        )
    figures = np.minimum(figures, rest)
    candidates = []
    for index, form, left in [best] if only_chosen else np.argwhere(figures[..., 1] < NEVER).tolist():
        mean, slowest, p50 = (figures[index, form, left] + cost.start_ns).tolist()
        chosen = (index, form, left) == best
        table = microbatches_of(CANDIDATES[index], tokens, starts, first, config.pipelined_ratio, config.num_slots)
        assignment: list[list[Microbatch]] = [[] for _ in range(table[-1, 0] + 1)]
        for cohort, rank, start, stop in table.tolist():
            assignment[cohort].append(Microbatch(rank, start, stop))
        num_blocks, arrivals = forms[form]
        arrivals, sms_left = (
            bool(arrivals) and in_one_slot(len(assignment), config.num_slots),
            int(lefts[index, form, left]),
        )
        candidates.append(
            Candidate(
                index, candidate_name(index), assignment, num_blocks, arrivals, sms_left, mean, slowest, p50, chosen
            )
        )
    return candidates, events


def _forms(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> list[tuple[int, int]]:
    """Blocks of columns, and 1 for waves computed as they arrive (in one slot; 0 in several), the usual form first."""
    if facts.num_ranks == 1:
        return [(config.combine_blocks or 1, int(config.arrivals or False))]
    may = config.arrivals is None and cost.experts.arrivals_permille > 0
    return [
        (n, arrivals)
        for arrivals in ((0, 1) if may else (int(config.arrivals or False),))
        for n in config.block_choices(shape.hidden)
    ]
