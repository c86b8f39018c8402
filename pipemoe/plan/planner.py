"""The planner: from exchanged facts to a plan. Pure and deterministic: whole numbers only, every tie broken by index."""

from __future__ import annotations

import numpy as np
from numba import njit

from pipemoe.errors import ConfigError, InputError
from pipemoe.plan.assignment import Assignment, assign
from pipemoe.plan.cost import CostModel
from pipemoe.plan.schedule import Cohort, Facts, ModelShape, OpKind, Plan, PlanConfig, Segment, Wave, causal_links


def plan(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel = CostModel(), assignment: Assignment | None = None) -> Plan:
    """Plan one forward pass.

    facts: tokens and sequences of every rank. assignment: the microbatches of each cohort, in order of priority; by default
    what `config.mode` prescribes. Raises InputError if a rank brings more than `max_tokens_per_rank` tokens, ConfigError if
    the assignment puts a later chunk of a sequence before an earlier one.
    """
    for rank, tokens in enumerate(facts.tokens):
        if tokens > config.max_tokens_per_rank:
            raise InputError(f"rank {rank}: {tokens} tokens in one step, more than max_tokens_per_rank={config.max_tokens_per_rank}")
    if assignment is None:
        assignment = assign(facts, config)
    # The wave split fills waves in this order: a rank's chunks from front to back, short ranks first.
    assignment = [sorted(microbatches, key=lambda m: (facts.tokens[m.rank], m)) for microbatches in assignment]
    links = causal_links(facts, [tuple(m) for m in assignment])
    for cohort, earlier in enumerate(links):
        if any(e > cohort for e in earlier):
            raise ConfigError(f"cohort {cohort} continues a sequence of cohort {max(earlier)}, which must come before it")
    cohorts = tuple(
        Cohort(index % config.num_slots, tuple(microbatches), _waves(microbatches, facts, config))
        for index, microbatches in enumerate(assignment)
    )
    return Plan(facts, shape, config, cohorts, _total_order(cohorts, links, shape, config, cost, facts.num_ranks))


def _waves(microbatches, facts: Facts, config: PlanConfig) -> tuple[Wave, ...]:
    if config.exchange == "padded":
        rows = max(facts.tokens)
        return (Wave(tuple(Segment(m.rank, m.start, m.stop, m.rank * rows) for m in microbatches), facts.num_ranks * rows),)
    total = sum(m.stop - m.start for m in microbatches)
    num_waves = -(-total // config.max_wave_rows(facts.num_ranks))
    waves, segments, row, size = [], [], 0, -(-total // num_waves)  # even sizes: no tiny last wave
    for rank, start, stop in microbatches:
        while start < stop:
            take = min(stop - start, size - row)
            segments.append(Segment(rank, start, start + take, row))
            start, row = start + take, row + take
            if row == size:
                waves.append(Wave(tuple(segments), row))
                segments, row = [], 0
    if segments:
        waves.append(Wave(tuple(segments), row))
    return tuple(waves)


def _layer_template(cohort: Cohort, cost: CostModel, num_ranks: int) -> list[tuple[int, int, int]]:
    """One layer of a cohort as (kind, wave, ns); the dispatch of a wave goes ahead of the experts of the one before."""
    waves = cohort.waves
    dispatch = [(OpKind.DISPATCH, w, cost.dispatch(wave.num_rows)) for w, wave in enumerate(waves)]
    template = [(OpKind.ATTEND, 0, cost.attend(max(cohort.tokens_of(r) for r in range(num_ranks)))), dispatch[0]]
    for w, wave in enumerate(waves):
        template += dispatch[w + 1 : w + 2]
        template += [(OpKind.EXPERTS, w, cost.experts(wave.num_rows)), (OpKind.COMBINE, w, cost.combine(wave.num_rows))]
    return template


def _total_order(cohorts, links, shape: ModelShape, config: PlanConfig, cost: CostModel, num_ranks: int) -> np.ndarray:
    """Order the operations by when they would start if every cohort ran alone, held up only by causality and by its slot."""
    templates = [_layer_template(cohort, cost, num_ranks) for cohort in cohorts]
    flat = np.array([entry for template in templates for entry in template], dtype=np.int64).reshape(-1, 3)
    bounds = np.cumsum([0] + [len(template) for template in templates])
    causal = np.array([(c, e) for c, earlier in enumerate(links) for e in sorted(earlier)], dtype=np.int64).reshape(-1, 2)
    start, order = _start_times(flat, bounds, causal, config.num_slots, shape.num_layers)
    return order[np.lexsort((order[:, 1], start))]


@njit(cache=True)
def _start_times(flat, bounds, causal, num_slots, num_layers):
    num_cohorts = len(bounds) - 1
    total = len(flat) * num_layers + num_cohorts
    start = np.empty(total, np.int64)
    order = np.empty((total, 4), np.int32)
    attended = np.zeros((num_cohorts, num_layers), np.int64)
    finished = np.zeros(num_cohorts, np.int64)
    at = 0
    for c in range(num_cohorts):
        now = finished[c - num_slots] if c >= num_slots else 0
        for layer in range(num_layers):
            for j in range(bounds[c], bounds[c + 1]):
                kind, wave, ns = flat[j, 0], flat[j, 1], flat[j, 2]
                if kind == 0:  # attend
                    for pair in range(len(causal)):
                        if causal[pair, 0] == c:
                            now = max(now, attended[causal[pair, 1], layer])
                start[at] = now
                order[at, 0], order[at, 1], order[at, 2], order[at, 3] = kind, c, layer, wave
                at += 1
                now += ns
                if kind == 0:
                    attended[c, layer] = now
        start[at] = now
        order[at, 0], order[at, 1], order[at, 2], order[at, 3] = 4, c, num_layers - 1, 0  # finish
        at += 1
        finished[c] = now + 1
    return start, order
