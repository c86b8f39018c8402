"""How to plan: the part of a user's configuration that plans depend on, and what its values may be."""

from __future__ import annotations

from dataclasses import dataclass

from pipemoe.arguments import shown
from pipemoe.errors import ConfigError

MODES = ("padded", "chunked", "broadcast", "two_batch", "per_rank", "pipelined", "auto")
UNCAPPED_MODES = ("padded", "broadcast")  # the baselines: one wave however many tokens there are
COMBINES = ("reduce", "gather")
_LARGEST = 2**31 - 1  # rows are counted in 32 bits here and there
OBJECTIVES = ("mean", "slowest", "p50")  # of the sequences' times to first token


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """How to plan. It is the same on every rank; the exchange of a step compares it.

    mode: what forms the cohorts. moe_max_num_tokens: rows that enter the fused MoE at once. max_tokens_per_rank: tokens
    that a rank may bring to one step; it sizes the workspace of the uncapped baselines. num_slots: cohorts that may be
    under way at once. combine: "reduce" (padded mode: reduce-scatter), or "gather" to the owner, which sums in rank
    order. pipelined_ratio: in mode "pipelined", ranks share a cohort if their token counts differ by at most this
    factor. whole_sequences: never put parts of one sequence into several cohorts (mode "two_batch" then halves the
    sequences, not their tokens). A model that takes only whole ones sets it.

    objective: "mean", "slowest" or "p50" of the sequences' times to first token. Mode "auto" takes the cohorts for
    which it is predicted to be lowest, as long as the slowest sequence comes at most `makespan_budget` (a fraction)
    later than it could.

    num_sms: multiprocessors that the experts' persistent kernels fill. With None, they leave room for the collectives
    that run beside the experts.
    """

    mode: str = "auto"
    moe_max_num_tokens: int = 8192
    max_tokens_per_rank: int = 16384
    num_slots: int = 4
    combine: str = "reduce"
    pipelined_ratio: int = 4
    whole_sequences: bool = False
    objective: str = "mean"
    makespan_budget: float = 0.25
    num_sms: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        if self.combine not in COMBINES:
            raise ConfigError(f"combine is {self.combine!r}; it must be one of {', '.join(COMBINES)}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective is {self.objective!r}; it must be one of {', '.join(OBJECTIVES)}")
        if not isinstance(self.makespan_budget, (int, float)) or not 0 <= self.makespan_budget <= 100:
            raise ConfigError(
                f"makespan_budget is {self.makespan_budget!r}; it must be a fraction from 0 (0.1 is 10 %) to 100"
            )
        for name in ("moe_max_num_tokens", "max_tokens_per_rank", "num_slots", "pipelined_ratio"):
            check_count(name, getattr(self, name), 1)
        if type(self.whole_sequences) is not bool:
            raise ConfigError(f"whole_sequences is {self.whole_sequences!r}; it must be True or False")
        if self.num_sms is not None:
            check_count("num_sms", self.num_sms, 1, ", or None")

    @property
    def exchange(self) -> str:
        """How waves are exchanged; mode auto also gathers some (see Plan.exchange)."""
        return "padded" if self.mode == "padded" else "broadcast"

    @property
    def gathered_waves(self) -> int:
        """Which waves are exchanged by all-gather and reduce-scatter: 0 none, 1 all, 2 those of equal segments."""
        return 1 if self.exchange == "padded" else 2 if self.mode == "auto" else 0

    @property
    def num_buffers(self) -> int:
        """Receive and partial-sum buffers per slot. Waves alternate between two; an uncapped mode has only one wave."""
        return 1 if self.mode in UNCAPPED_MODES else 2

    @property
    def max_slots(self) -> int:
        """Slots that a plan of this mode can use."""
        return (
            1
            if self.mode in (*UNCAPPED_MODES, "chunked")
            else min(2, self.num_slots)
            if self.mode == "two_batch"
            else self.num_slots
        )

    @property
    def cuts_sequences(self) -> bool:
        """May a plan put parts of one sequence into several cohorts?"""
        return self.mode in ("two_batch", "auto") and not self.whole_sequences

    def max_wave_rows(self, num_ranks: int) -> int:
        """Rows that a wave's buffers must hold. It depends on the configuration alone."""
        if self.mode in UNCAPPED_MODES:
            return num_ranks * self.max_tokens_per_rank
        return min(self.moe_max_num_tokens, num_ranks * self.max_tokens_per_rank)


def check_count(name: str, value: object, least: int, otherwise: str = "") -> None:
    """Raise ConfigError unless a setting is a whole number from `least` to what 32 bits hold."""
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least {least}{otherwise}")
    if value > _LARGEST:
        raise ConfigError(f"{name} is {shown(value)}; it must be at most {_LARGEST}{otherwise}")
