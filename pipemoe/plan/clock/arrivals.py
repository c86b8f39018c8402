"""What a layer costs if its waves are computed as they arrive. Compiled."""

from __future__ import annotations

import numpy as np

from pipemoe.plan.clock.layer import ALONE, BUSY, with_costs
from pipemoe.plan.compiled import compiled
from pipemoe.plan.cost.model import experts_busy


@compiled
def take_own_rows_first(costs, segments, wave_rows, rates, num_experts, top_k, sms_left):
    """The same layer with a rank's own rows of each wave computed before the others' have come, in a call of their own:
    `early`. Waves that are gathered, or all of one rank, are computed whole. Blocks of columns are cut afterwards.
    """
    num_cohorts, num_ranks, num_waves = costs.own.shape
    compute, early = costs.compute.copy(), np.zeros((num_cohorts, num_ranks, num_waves, 2), np.int64)
    own_rows = np.zeros((num_cohorts, num_ranks, num_waves), np.int64)
    for i in range(len(segments)):
        own_rows[segments[i, 0], segments[i, 2], segments[i, 1]] += segments[i, 4] - segments[i, 3]
    for c in range(num_cohorts):
        for w in range(costs.num_waves[c]):
            for r in range(num_ranks):
                own = own_rows[c, r, w]
                if own and own < wave_rows[c, w] and not costs.gathered[c, w]:
                    busy = experts_busy(rates, own, num_experts, top_k, num_ranks, sms_left)
                    early[c, r, w, ALONE], early[c, r, w, BUSY] = rates.experts_fixed_ns + busy, busy
                    busy = experts_busy(rates, wave_rows[c, w] - own, num_experts, top_k, num_ranks, sms_left)
                    compute[c, r, 1 + w, ALONE], compute[c, r, 1 + w, BUSY] = rates.experts_fixed_ns + busy, busy
    return with_costs(costs, compute, costs.exchange, costs.num_blocks, early, 1)
