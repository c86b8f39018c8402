"""The total order: operations by when they would start if every cohort ran alone, held up by causality and its slot."""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.layer import ALONE, COMBINE, DISPATCH, FIRST_ATTEND
from pipemoe.plan.clock.rules import ATTEND_OP, COMBINE_OP, DISPATCH_OP, FINISH_OP, layer_template
from pipemoe.plan.compiled import compiled_part
from pipemoe.plan.waits import LAYER_OF


@compiled_part
def order_keys(costs, rates, num_slots, num_layers):
    """[C, n] ns: when each cohort's operations would start, in the order in which it runs them."""
    num_waves = costs.num_waves
    # taking an array out of the tuple counts references, so not inside loops
    compute, exchange, waits, issue = costs.compute, costs.exchange, costs.waits, costs.issue
    num_cohorts, most_waves = len(num_waves), costs.own.shape[2]
    keys = np.zeros((num_cohorts, num_layers * (1 + 3 * most_waves) + 1), np.int64)
    attended = np.zeros((num_cohorts, num_layers), np.int64)
    nanoseconds, first = np.zeros((num_cohorts, 1 + 3 * most_waves), np.int64), np.zeros(num_cohorts, np.int64)
    for c in range(num_cohorts):
        template = layer_template(num_waves[c])
        for j in range(len(template)):
            kind, wave = template[j, 0], template[j, 1]
            if kind == ATTEND_OP:
                for r in range(compute.shape[1]):
                    nanoseconds[c, j] = max(nanoseconds[c, j], compute[c, r, 0, ALONE], issue[c, r])
                    first[c] = max(first[c], compute[c, r, FIRST_ATTEND, ALONE], issue[c, r])
            elif kind == DISPATCH_OP:
                nanoseconds[c, j] = max(exchange[c, DISPATCH, wave, ALONE], rates.host_dispatch_ns)
            elif kind == COMBINE_OP:
                nanoseconds[c, j] = max(exchange[c, COMBINE, wave, ALONE], rates.host_combine_ns)
            else:
                nanoseconds[c, j] = max(compute[c, 0, 1 + wave, ALONE], rates.host_experts_ns)
    now = np.zeros(num_cohorts, np.int64)
    for turn in range(0, num_cohorts, num_slots):
        in_turn = range(turn, min(turn + num_slots, num_cohorts))
        for c in in_turn:
            now[c] = now[c - num_slots] + 1 if turn else 0
        for layer in range(num_layers):
            for c in in_turn:
                for e in range(num_cohorts):
                    if waits[c, e] == LAYER_OF:
                        now[c] = max(now[c], attended[e, layer])
                    elif waits[c, e] and layer:
                        now[c] = max(now[c], attended[e, layer - 1])
                at = layer * (1 + 3 * num_waves[c])
                for j in range(1 + 3 * num_waves[c]):
                    keys[c, at + j] = now[c]
                    now[c] += first[c] if layer + j == 0 else nanoseconds[c, j]
                    if j == 0:
                        attended[c, layer] = now[c]
        for c in in_turn:
            keys[c, num_layers * (1 + 3 * num_waves[c])] = now[c]
    return keys


def merge_orders(keys, num_waves, num_layers):
    """All cohorts' operations in order: int32 [num_ops, 4] = kind, cohort, layer, wave. Ties go to the lower cohort."""
    orders = [cohort_order(cohort, waves, num_layers) for cohort, waves in enumerate(num_waves.tolist())]
    # never falling, within a cohort
    times = np.concatenate([of_cohort[: len(order)] for of_cohort, order in zip(keys, orders, strict=True)])
    return np.concatenate(orders)[np.argsort(times, kind="stable")]


def cohort_order(cohort, num_waves, num_layers):
    """The order of one cohort's operations, as merge_orders has them."""
    template = layer_template(num_waves)
    order = np.zeros((num_layers * len(template) + 1, 4), np.int32)
    order[:, 1] = cohort
    order[:-1, 0], order[:-1, 3] = np.tile(template, (num_layers, 1)).T
    order[:-1, 2] = np.repeat(np.arange(num_layers), len(template))
    order[-1, 0], order[-1, 2] = FINISH_OP, num_layers - 1
    return order
