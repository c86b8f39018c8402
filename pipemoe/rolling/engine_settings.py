"""How pipemoe.Engine makes up rounds, from its arguments and the model's configuration."""

from __future__ import annotations

from pipemoe.arguments import shown, whole_number
from pipemoe.errors import ConfigError
from pipemoe.rolling.admission import POLICIES, RollingSettings

_STEP_TOKENS = 2048


def engine_settings(
    policy: str, step_tokens: int | None, *, max_tokens_per_rank: int, num_ranks: int, cuts: bool
) -> RollingSettings:
    """The settings of an engine. step_tokens: see pipemoe.Engine. cuts: may sequences be cut into chunks?

    Raises ConfigError.
    """
    if policy not in POLICIES:
        raise ConfigError(f"policy is {shown(policy)}; it must be one of {', '.join(POLICIES)}")
    chunk = min(_STEP_TOKENS, max_tokens_per_rank)
    if step_tokens is not None:
        chunk = whole_number("step_tokens", step_tokens, 1, ConfigError)
    if chunk > max_tokens_per_rank:
        raise ConfigError(f"step_tokens is {chunk}, more than max_tokens_per_rank={max_tokens_per_rank}")
    of_rank = chunk if cuts else max_tokens_per_rank
    return RollingSettings(
        max_tokens_per_round=of_rank,
        max_round_rows=num_ranks * of_rank,
        chunk_tokens=chunk,
        policy=policy,
        short_round_rows=chunk if policy == "rolling" else None,
        cuts=cuts,
    ).checked()
