"""Which cohorts' attention waits for which other's. Plain Python for a plan; compiled for the planner and the clock."""

from __future__ import annotations

import numpy as np

from pipemoe.plan.compiled import compiled_part

LAYER_OF, LAYER_BEFORE = 1, 2


@compiled_part
def attention_waits(microbatches, num_cohorts, starts, first, num_slots):
    """int64 [C, C]: which attention the row's cohort waits for, of the same layer (LAYER_OF), of the layer before
    (LAYER_BEFORE), or none (0).

    microbatches int64 [M, 4]: cohort, rank, start, stop. starts, first: Facts.flat_boundaries. A cohort reads the keys
    and values of the earlier chunks of its sequences. Where both take the slots in the same turn, the earlier chunk
    also waits for what continues it: running further ahead would gain it nothing, and would leave the rest of its
    sequences to end alone.
    """
    waits = np.zeros((num_cohorts, num_cohorts), np.int64)
    last_of_rank, one_before = np.full(len(first) - 1, -1), np.empty(len(microbatches), np.int64)
    for m in range(len(microbatches)):
        one_before[m] = last_of_rank[microbatches[m, 1]]
        last_of_rank[microbatches[m, 1]] = m
    for later in range(len(microbatches)):
        c, r, start = microbatches[later, 0], microbatches[later, 1], microbatches[later, 2]
        s = first[r]
        while starts[s + 1] <= start:
            s += 1
        if starts[s] == start:
            continue
        earlier = last_of_rank[r]
        while earlier >= 0:
            e = microbatches[earlier, 0]
            if microbatches[earlier, 2] < start and microbatches[earlier, 3] > starts[s] and e != c:
                waits[c, e] = LAYER_OF
                if e // num_slots == c // num_slots:
                    waits[e, c] = LAYER_BEFORE
            earlier = one_before[earlier]
    return waits
