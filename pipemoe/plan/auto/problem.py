"""What mode "auto" chooses by: the step, the costs, and the user's objective. Compiled.

figures [N, 3] holds each candidate's mean, slowest and p50 in ns, or NEVER if it does not apply or was not run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pipemoe.plan.clock.rules import NEVER
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.products import scaled

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
def objective_ns(figures, problem):
    return min(figures[problem.objective], LONGEST)


@compiled_part
def allowed_ns(lowest, problem):
    """The latest that the slowest sequence may come, if it could come at `lowest`."""
    return lowest + min(lowest, LONGEST) // 1000 * problem.budget_permille


@compiled_part
def price_of(figures, margins, problem, k):
    """The objective with its margin (permille, [N]): what candidates are compared by."""
    return scaled(objective_ns(figures[k], problem), margins[k], 1000)


@compiled_part
def best_candidate(figures, margins, lowest, problem):
    """The one with the lowest price among those in time, or -1."""
    best, allowed = -1, allowed_ns(lowest, problem)
    for k in range(len(figures)):
        if figures[k, 1] == NEVER or figures[k, 1] > allowed:
            continue
        if best < 0 or price_of(figures, margins, problem, k) < price_of(figures, margins, problem, best):
            best = k
    return best
