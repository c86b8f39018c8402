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
from pipemoe.plan.auto.forms import try_forms
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
    num_column_blocks: int
    arrivals: bool
    sms_left: int
    mean: int
    slowest: int
    p50: int
    chosen: bool


def auto_assignment(
    facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel
) -> tuple[Assignment, int, bool, int]:
    """What mode auto chooses: cohorts, the number of blocks of columns, whether waves are computed as they arrive, and
    how many multiprocessors the experts leave.
    """
    found = evaluate(facts, shape, config, cost, only_chosen=True)[0]
    if not found:
        return [], config.combine_blocks or 1, False, forced_sms_left(config, cost.sms) or 0
    return found[0].assignment, found[0].num_column_blocks, found[0].arrivals, found[0].sms_left


def auto_candidates(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> list[Candidate]:
    """All candidates, each once; one is `chosen`. At equal figures the earlier is preferred. The best ones come again
    in another form, and with other numbers of multiprocessors left.
    """
    check_magnitude(facts, shape, config, cost)
    return evaluate(facts, shape, config, cost, only_chosen=False)[0]


def evaluate(
    facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel, *, only_chosen: bool
) -> tuple[list[Candidate], int]:
    """The candidates, or only the chosen one, and how many events on the clock choosing took."""
    if not any(facts.tokens):
        return [], 0
    problem = _problem(facts, shape, config, cost)
    forms = _forms(facts, shape, config, cost)
    tables = WHOLE_CANDIDATES if config.whole_sequences else CANDIDATES, np.array(forms), problem
    figures, lefts, margins, there, best, lowest, events, passed_over = search(*tables, only_chosen)
    if best[0] < 0:
        raise PlanError("no candidate can be carried out")
    if len(forms) > 1 or cost.sms.num_sms:  # where there is nothing to try, its code is not even compiled
        best, events = try_forms(*tables, figures, lefts, margins, there, best, lowest, events)
    figures = np.minimum(figures, passed_over)
    candidates = []
    for index, form, left in [best] if only_chosen else np.argwhere(figures[..., 1] < NEVER).tolist():
        mean, slowest, p50 = (figures[index, form, left] + cost.start_ns).tolist()
        chosen = (index, form, left) == best
        assignment = assignment_of(microbatches_of(CANDIDATES[index], *problem[:3], problem.ratio, config.num_slots))
        num_blocks, arrivals = forms[form][0], bool(forms[form][1])
        sms_left = int(lefts[index, form, left])
        candidates.append(
            Candidate(
                index,
                candidate_name(index),
                assignment,
                num_blocks,
                arrivals,
                sms_left,
                mean,
                slowest,
                p50,
                chosen,
            )
        )
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


def _forms(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> list[tuple[int, int]]:
    """The forms to try, the usual one first: blocks of columns, and 1 if waves are computed as they arrive, else 0."""
    if facts.num_ranks == 1:
        return [(config.combine_blocks or 1, int(config.arrivals or False))]
    may = config.arrivals is None
    return [
        (n, arrivals)
        for arrivals in ((0, 1) if may else (int(config.arrivals or False),))
        for n in config.block_choices(shape.hidden)
    ]
