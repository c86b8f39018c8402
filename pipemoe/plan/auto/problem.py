"""What mode "auto" chooses by: the step, the costs, and the user's objective. Compiled.

A place in the tables is (candidate, form, multiprocessors left): figures [N, F, 3, 3] holds mean, slowest and p50 in
ns, or NEVER if the candidate does not apply or was not run; lefts [N, F, 3] the multiprocessors left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.cost.tuned import FORM_MARGIN, SMS_MARGIN
from pipemoe.plan.products import scaled

AS_USUAL, NONE, TWICE = 0, 1, 2  # multiprocessors left: usual_sms_left, none, or twice as many as usual
LONGEST = 1 << 53  # ns: longer times count as that, so that a thousand of one fit int64


class Problem(NamedTuple):
    tokens: Any  # [R]
    starts: Any  # with `first`: Facts.flat_boundaries
    first: Any
    rates: Any  # rates_of(cost)
    speeds: Any  # speeds_of(cost)
    num_experts: Any
    top_k: Any
    num_layers: Any
    most_rows: Any  # of a wave
    num_slots: Any
    num_buffers: Any
    gather: Any  # is combine "gather"?
    forced_sms_left: Any  # -1: free to choose
    objective: Any  # index in OBJECTIVES
    budget_permille: Any  # by which the slowest may come later than it could
    ratio: Any  # of similar ranks


@compiled_part
def place_of(k, form, left):
    """Always three int64: numba compiles functions anew for every literal in a tuple."""
    return np.int64(k), np.int64(form), np.int64(left)


@compiled_part
def objective_ns(figures, problem):
    return min(figures[problem.objective], LONGEST)


@compiled_part
def allowed_ns(lowest, problem):
    """The latest that the slowest sequence may come, if it could come at `lowest`."""
    return lowest + min(lowest, LONGEST) // 1000 * problem.budget_permille


@compiled_part
def margin_of(margins, at):
    """permille: margins [N] of the candidates' cohorts, and what is not as usual."""
    return margins[at[0]] + (FORM_MARGIN if at[1] else 0) + (SMS_MARGIN if at[2] else 0)


@compiled_part
def price_of(figures, margins, problem, at):
    """The objective with its margin: what places are compared by."""
    return scaled(objective_ns(figures[at], problem), margin_of(margins, at), 1000)


@compiled_part
def best_place(figures, margins, lowest, problem):
    """The place with the lowest price among those in time; its candidate is -1 if there is none."""
    best, allowed = place_of(-1, 0, AS_USUAL), allowed_ns(lowest, problem)
    for n in range(figures.shape[1]):
        for left in range(figures.shape[2]):
            for k in range(len(figures)):
                at = place_of(k, n, left)
                if figures[at][1] == NEVER or figures[at][1] > allowed:
                    continue
                if best[0] < 0 or price_of(figures, margins, problem, at) < price_of(figures, margins, problem, best):
                    best = at
    return best
