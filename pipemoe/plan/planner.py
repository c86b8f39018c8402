"""The planner: from exchanged facts to a plan. Pure and deterministic: whole numbers, ties to the lower index."""

from __future__ import annotations

import numpy as np

from pipemoe.errors import ConfigError, InputError
from pipemoe.plan.auto.candidates import Assignment, fixed_assignment
from pipemoe.plan.auto.choice import auto_assignment
from pipemoe.plan.clock.layer import cut_waves, layer_costs
from pipemoe.plan.clock.order import cohort_order, merge_orders, order_keys
from pipemoe.plan.clock.sms import forced_sms_left, room_for_collectives, usual_sms_left
from pipemoe.plan.compiled import compiled
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.magnitude import check_magnitude
from pipemoe.plan.cost.model import CostModel, rates_of
from pipemoe.plan.schedule import Cohort, Facts, Microbatch, ModelShape, Plan, Segment, Wave
from pipemoe.plan.waits import LAYER_OF, attention_waits


def plan(
    facts: Facts,
    shape: ModelShape,
    config: PlanConfig,
    cost: CostModel = CostModel(),
    assignment: Assignment | None = None,
    *,
    first_slot: int = 0,
    slots_in_use: int = 0,
) -> Plan:
    """Plan one forward pass.

    facts: tokens and sequences of every rank. assignment: the microbatches of each cohort, in order of priority; by
    default what `config.mode` prescribes. first_slot: of the first cohort; the others follow. slots_in_use: by all that
    runs on the ranks meanwhile, so that kernels leave room for its collectives; 0: there is nothing but this plan.

    Raises InputError if a rank brings more than `max_tokens_per_rank` tokens, or the step is too long for the planner's
    arithmetic (see magnitude), ConfigError if the assignment puts a later chunk of a sequence before an earlier one, or
    there are fewer multiprocessors than `num_sms`.
    """
    sms_left = forced_sms_left(config, cost.sms)
    for rank, tokens in enumerate(facts.tokens):
        if tokens > config.max_tokens_per_rank:
            raise InputError(
                f"rank {rank}: {tokens} tokens in one step, more than max_tokens_per_rank={config.max_tokens_per_rank}"
            )
    check_magnitude(facts, shape, config, cost)
    if assignment is None and config.mode == "auto":
        assignment, sms_left = auto_assignment(facts, shape, config, cost)
    elif assignment is None:
        assignment = fixed_assignment(facts, config)
    if sms_left is None and slots_in_use > 1:
        sms_left = room_for_collectives(cost.sms.num_sms, cost.sms.ctas, slots_in_use)
    if not assignment:
        return Plan(facts, shape, config, (), np.empty((0, 4), np.int32), sms_left or 0)
    # The wave split fills waves in this order: a rank's chunks from front to back, short ranks first.
    assignment = [sorted(microbatches, key=lambda m: (facts.tokens[m.rank], m)) for microbatches in assignment]
    table = np.array([(c, *m) for c, microbatches in enumerate(assignment) for m in microbatches], dtype=np.int64)
    starts, first = facts.flat_boundaries
    padded_rows = max(facts.tokens) if config.exchange == "padded" else 0
    limits = (
        config.max_wave_rows(facts.num_ranks),
        config.num_slots,
        shape.num_layers,
        padded_rows,
        -1 if sms_left is None else sms_left,
    )
    if len(assignment) == 1:
        segments, wave_rows, num_waves, order, sms_left = _tables_of_one(table, facts.num_ranks, rates_of(cost), limits)
    else:
        gather, gathered = config.combine == "gather", config.gathered_waves
        segments, wave_rows, num_waves, keys, sms_left, wrong = _tables(
            table, starts, first, rates_of(cost), shape.num_experts, shape.top_k, limits, gather, gathered
        )
        if wrong[0] >= 0:
            raise ConfigError(f"cohort {wrong[0]} continues a sequence of cohort {wrong[1]}, which must come before it")
        order = merge_orders(keys, num_waves, shape.num_layers)
    cohorts = _cohorts(assignment, segments, wave_rows, num_waves, config.num_slots, padded_rows, first_slot)
    return Plan(facts, shape, config, cohorts, order, sms_left)


def planner_is_kept() -> bool:
    """Will other processes of this machine find on disk what this one compiles?"""
    return _tables.is_kept


def compile_planner(num_ranks: int, shape: ModelShape, config: PlanConfig, cost: CostModel) -> None:
    """Make a small plan, so that everything is compiled that plans of this configuration may need. No step compiles."""
    tokens = min(2, config.max_tokens_per_rank)
    facts = Facts(((tokens,), *((1,),) * (num_ranks - 1)))
    plan(facts, shape, config, cost)
    several = [
        [Microbatch(0, 0, 1)],
        [Microbatch(0, 1, 2)] if tokens > 1 else [Microbatch(1, 0, 1)] if num_ranks > 1 else [],
    ]
    if several[1] and (
        config.mode in ("two_batch", "auto") or (config.mode in ("per_rank", "pipelined") and num_ranks > 1)
    ):
        plan(facts, shape, config, cost, several)


def _tables_of_one(microbatches, num_ranks, rates, limits):
    """What _tables returns, for one cohort. Its order needs no costs, so modes of one cohort need no compiled code."""
    most_rows, num_slots, num_layers, padded_rows, sms_left = limits
    segments, wave_rows, num_waves = cut_waves(microbatches, 1, most_rows)
    if padded_rows:
        wave_rows = np.full((1, 1), num_ranks * padded_rows)
    if sms_left < 0:
        sms_left = usual_sms_left(rates, num_waves, num_slots)
    order = cohort_order(0, num_waves[0], num_layers)
    return segments, wave_rows, num_waves, order, sms_left


@compiled(seconds=5)
def _tables(microbatches, starts, first, rates, num_experts, top_k, limits, gather, gathered):
    """Segments, rows of the waves, waves of the cohorts, order_keys, and the multiprocessors left (-1 in `limits`: as
    usual). Also a cohort, and a later one whose sequences it continues, which is wrong (-1: there is none). All in one
    compiled call: passing arrays between several would take longer than computing them.
    """
    most_rows, num_slots, num_layers, padded_rows, sms_left = limits
    num_cohorts = microbatches[-1, 0] + 1
    waits = attention_waits(microbatches, num_cohorts, starts, first, num_slots)
    wrong = (-1, -1)
    for cohort in range(num_cohorts):
        for other in range(cohort, num_cohorts):
            if waits[cohort, other] == LAYER_OF and wrong[0] < 0:
                wrong = (cohort, other)
    segments, wave_rows, num_waves = cut_waves(microbatches, num_cohorts, most_rows)
    if padded_rows:
        wave_rows = np.full((1, 1), (len(first) - 1) * padded_rows)
    if sms_left < 0:
        sms_left = usual_sms_left(rates, num_waves, num_slots)
    costs = layer_costs(
        segments, wave_rows, num_waves, waits, starts, first, rates, num_experts, top_k, gather, gathered, sms_left
    )
    return segments, wave_rows, num_waves, order_keys(costs, rates, num_slots, num_layers), sms_left, wrong


def _cohorts(
    assignment, segments, wave_rows, num_waves, num_slots: int, padded_rows: int, first_slot: int
) -> tuple[Cohort, ...]:
    waves: list[list[list[Segment]]] = [[[] for _ in range(count)] for count in num_waves.tolist()]
    for cohort, wave, rank, start, stop in segments.tolist():
        of_wave = waves[cohort][wave]
        row = rank * padded_rows if padded_rows else of_wave[-1].row + of_wave[-1].num_rows if of_wave else 0
        of_wave.append(Segment(rank, start, stop, row))
    rows = wave_rows.tolist()
    return tuple(
        Cohort(
            (first_slot + c) % num_slots,
            tuple(microbatches),
            tuple(Wave(tuple(of_wave), rows[c][w]) for w, of_wave in enumerate(waves[c])),
        )
        for c, microbatches in enumerate(assignment)
    )
