"""Which microbatches share a cohort: one rule per fixed mode.

An assignment is a list of cohorts, each a list of microbatches; earlier cohorts get the higher priority, and a later
chunk of a sequence never stands in an earlier cohort than the chunks before it.
"""

from __future__ import annotations

from pipemoe.plan.config import PlanConfig
from pipemoe.plan.schedule import Facts, Microbatch

Assignment = list[list[Microbatch]]


def assign(facts: Facts, config: PlanConfig) -> Assignment:
    """Cohorts of this step under `config.mode`; cohorts and microbatches without tokens are left out."""
    whole = [Microbatch(rank, 0, tokens) for rank, tokens in enumerate(facts.tokens) if tokens]
    by_length = sorted(whole, key=lambda m: (m.stop, m.rank))
    if config.mode == "two_batch":
        halves = [[Microbatch(m.rank, 0, m.stop - m.stop // 2) for m in by_length]]
        halves.append([Microbatch(m.rank, m.stop - m.stop // 2, m.stop) for m in by_length if m.stop > 1])
        return [half for half in halves if half]
    if config.mode == "per_rank":
        return [[m] for m in by_length]
    if config.mode == "pipelined":
        return _by_similar_count(by_length, config)
    return [by_length] if by_length else []


def _by_similar_count(by_length: list[Microbatch], config: PlanConfig) -> Assignment:
    """Neighbours in length share a cohort while the longest is at most `pipelined_ratio` times the shortest; never more
    cohorts than slots (a cohort that has to queue for a slot is worse off than one that travels with longer
    company)."""
    cohorts: Assignment = []
    for m in by_length:
        if cohorts and (m.stop <= config.pipelined_ratio * cohorts[-1][0].stop or len(cohorts) == config.num_slots):
            cohorts[-1].append(m)
        else:
            cohorts.append([m])
    return cohorts
