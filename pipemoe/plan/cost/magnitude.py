"""Whether a step is small enough for the planner's arithmetic: compiled code counts nanoseconds in int64, which wraps.

The bound is what the step would take if nothing ran beside anything else, in Python's whole numbers. Contention makes
an operation take up to a thousand times as long; with that, the clock's products and predictions still fit 63 bits.
"""

from __future__ import annotations

from pipemoe.errors import InputError
from pipemoe.plan.config import PlanConfig
from pipemoe.plan.cost.model import GRAPH_ROWS, CostModel
from pipemoe.plan.schedule import MAX_GROUPS, Facts, ModelShape

LONGEST_NS = 5 * 10**14  # 5.8 days
MOST_TOKENS = (1 << 31) - 1  # of all ranks; token counts travel as int32
_DAY_NS = 86_400 * 10**9
_MOST_CHUNKS = 4  # that a sequence is cut into by mode auto, see CANDIDATES


def check_magnitude(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> None:
    """Raises InputError if the step has more tokens, or could take longer, than can be planned for."""
    if sum(facts.tokens) > MOST_TOKENS:
        raise InputError(
            f"{sum(facts.tokens)} tokens in one step; at most {MOST_TOKENS} can be planned for, so bring fewer"
        )
    longest = longest_ns(facts, shape, config, cost)
    if longest > LONGEST_NS:
        raise InputError(
            f"by these costs a step of {sum(facts.tokens)} tokens may take {longest // _DAY_NS} days; at most "
            f"{LONGEST_NS // _DAY_NS} can be "
            "planned for. Bring fewer tokens, or look at the costs"
        )


def longest_ns(facts: Facts, shape: ModelShape, config: PlanConfig, cost: CostModel) -> int:
    """An upper bound for any plan: all operations one after another at full speed, no two ranks at once."""
    num_ranks, tokens = facts.num_ranks, sum(facts.tokens)
    rows = num_ranks * max(facts.tokens) if config.exchange == "padded" else tokens
    pairs = sum(t * max(lengths) for t, lengths in zip(facts.tokens, facts.lengths) if t)
    microbatches = _MOST_CHUNKS * (num_ranks + sum(map(len, facts.lengths)))
    waves = microbatches + rows // min(config.moe_max_num_tokens, max(1, rows))
    attended = tokens + microbatches * GRAPH_ROWS[-1]
    local = -(-shape.num_experts // num_ranks)
    attend, experts, host = cost.attend, cost.experts, cost.host

    of_attention = (
        microbatches * (attend.fixed_ns + attend.weights_ns)
        + attended * attend.row_ps // 1000
        + pairs * attend.pair_fs // 10**6
    )
    first = (
        microbatches * attend.first_weights_ns
        + attended * attend.first_row_ps // 1000
        + pairs * attend.first_pair_fs // 10**6
    )
    of_attention, first = (ns * (1000 + attend.crowd_permille) // 1000 for ns in (of_attention, first))

    pair_ps = (rows * shape.top_k + waves * local * (experts.tile_rows + 1)) * experts.pair_ps
    pair_ps = pair_ps * max(1, cost.sms.num_sms) // (config.num_sms or max(1, cost.sms.num_sms // 2))
    of_experts = waves * (experts.fixed_ns + local * experts.expert_ns) + (pair_ps + rows * experts.row_ps) // 1000

    of_transfers = 0
    for exchange in (cost.dispatch, cost.combine):
        calls = waves * (exchange.fixed_ns + (microbatches + num_ranks) * exchange.segment_ns)
        of_transfers += calls + num_ranks * rows * exchange.row_ps // 1000

    issuing = microbatches * (host.attend_ns + host.graph_ns + host.finish_ns + host.idle_ns)
    issuing += waves * (MAX_GROUPS * host.dispatch_ns + host.pack_ns + host.experts_ns + host.combine_ns)
    once = cost.start_ns + microbatches * cost.finish_ns
    return shape.num_layers * (of_attention + of_experts + of_transfers + issuing) + first + once
