"""Mode "auto": prices the candidates, runs the promising ones on the clock, and takes the best by the objective."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipemoe.errors import PlanError
from pipemoe.plan.auto.candidates import (
    CANDIDATES,
    MOST_RATIO,
    WHOLE_CANDIDATES,
    Assignment,
    assignment_of,
    candidate_name,
)
from pipemoe.plan.auto.problem import Problem
from pipemoe.plan.auto.search import microbatches_of, search
from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.clock.sms import forced_sms_left
from pipemoe.plan.config import OBJECTIVES, PlanConfig
from pipemoe.plan.cost.magnitude import check_magnitude
from pipemoe.plan.cost.model import CostModel, rates_of, speeds_of
from pipemoe.plan.schedule import Facts, ModelShape


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to form cohorts, and what it is predicted to take, in ns."""

    index: int  # in CANDIDATES
    name: str
    assignment: Assignment
    sms_left: int
    mean: int
    slowest: int
    p50: int
    chosen: bool


def auto_assignment(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> tuple[Assignment, int]:
    """What mode auto chooses: cohorts, and how many multiprocessors the experts leave."""
    found = evaluate(facts, shape, config, cost, only_chosen=True)[0]
    if not found:
        return [], forced_sms_left(config, cost.sms) or 0
    return found[0].assignment, found[0].sms_left


def auto_candidates(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> list[Candidate]:
    """All candidates, each once; one is `chosen`. At equal figures the earlier is preferred."""
    check_magnitude(facts, shape, config, cost)
    return evaluate(facts, shape, config, cost, only_chosen=False)[0]


def evaluate(
    facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel, *, only_chosen: bool
) -> tuple[list[Candidate], int]:
    """The candidates, or only the chosen one, and how many events on the clock choosing took."""
    if not any(facts.tokens):
        return [], 0
    problem = _problem(facts, shape, config, cost)
    kinds = WHOLE_CANDIDATES if config.whole_sequences else CANDIDATES
    figures, lefts, best, events, passed_over = search(kinds, problem, only_chosen)
    if best < 0:
        raise PlanError("no candidate can be carried out")
    figures = np.minimum(figures, passed_over)
    candidates = []
    for k in [best] if only_chosen else np.flatnonzero(figures[:, 1] < NEVER).tolist():
        mean, slowest, p50 = (figures[k] + cost.start_ns).tolist()
        assignment = assignment_of(microbatches_of(CANDIDATES[k], *problem[:3], problem.ratio, config.num_slots))
        name, sms_left = candidate_name(k), int(lefts[k])
        candidates.append(Candidate(k, name, assignment, sms_left, mean, slowest, p50, chosen=k == best))
    return candidates, events


def _problem(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> Problem:
    forced = forced_sms_left(config, cost.sms)
    return Problem(
        np.array(facts.tokens, dtype=np.int64),
        *facts.flat_boundaries,
        rates_of(cost),
        speeds_of(cost),
        shape.num_experts,
        shape.top_k,
        shape.num_layers,
        config.max_wave_rows(facts.num_ranks),
        config.num_slots,
        config.num_buffers,
        config.combine == "gather",
        -1 if forced is None else forced,
        OBJECTIVES.index(config.objective),
        round(config.makespan_budget * 1000),
        min(config.pipelined_ratio, MOST_RATIO),
    )
