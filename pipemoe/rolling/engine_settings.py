"""How pipemoe.Engine makes up rounds, from its arguments and the model's configuration."""

from __future__ import annotations

from pipemoe.arguments import shown, whole_number
from pipemoe.errors import ConfigError
from pipemoe.rolling.admission import POLICIES, RollingSettings
from pipemoe.rolling.round_time import RoundTime

_STEP_TOKENS = 2048  # of a lockstep policy


def engine_settings(
    policy: str,
    step_tokens: int | None,
    *,
    max_tokens_per_rank: int,
    num_ranks: int,
    cuts: bool,
    num_slots: int | None = None,
    times: RoundTime | None = None,
) -> RollingSettings:
    """The settings of an engine. step_tokens, num_slots: see pipemoe.Engine. cuts: may sequences be cut into chunks?
    times: says, by the cost model, how large rolling rounds and chunks are, unless step_tokens is given, and how many
    slots roll, unless num_slots is given.

    Raises ConfigError.
    """
    if policy not in POLICIES:
        raise ConfigError(f"policy is {shown(policy)}; it must be one of {', '.join(POLICIES)}")
    by_cost = times if policy == "rolling" and step_tokens is None else None
    chunk = max_tokens_per_rank if by_cost else min(_STEP_TOKENS, max_tokens_per_rank)
    if step_tokens is not None:
        chunk = whole_number("step_tokens", step_tokens, 1, ConfigError)
    if num_slots is not None:
        whole_number("num_slots", num_slots, 1, ConfigError)
    if chunk > max_tokens_per_rank:
        raise ConfigError(f"step_tokens is {chunk}, more than max_tokens_per_rank={max_tokens_per_rank}")
    of_rank = chunk if cuts else max_tokens_per_rank
    return RollingSettings(
        max_tokens_per_round=of_rank,
        max_round_rows=num_ranks * of_rank,
        chunk_tokens=chunk,
        policy=policy,
        cuts=cuts,
        fixed_rows=by_cost.fixed_rows() if by_cost else 0,
        shares_cores=by_cost.shares_cores if by_cost else False,
        pairs_per_row=by_cost.pairs_per_row() if by_cost else 0,
        beside_rows=by_cost.beside_rows() if by_cost else 0,
        most_slots=num_slots or (times.useful_slots() if times else 0),
    ).checked()
