"""The user's configuration: how to plan, and how to compute and check."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pipemoe.errors import ConfigError
from pipemoe.plan.schedule import PlanConfig

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Config(PlanConfig):
    """Everything of PlanConfig, and

    num_slots: None takes as many as the world was started with. combine_dtype: what partial sums travel as, "float32", "bfloat16"
    or "float16"; None takes the model's on a GPU, float32 on the host. deterministic: bitwise equal MoE rows for equal rows in,
    whatever the mode, cohorts, waves and ranks (selects combine="gather", with float64 sums on a fixed grid). experts: "auto", or
    the implementation by name. graph_tokens: on a GPU, attention on about so many tokens of a cohort, or fewer, is launched as
    CUDA graphs, captured when the model is made: rounded up to one of pipemoe.plan.cost.GRAPH_ROWS, the largest at most (0: none).
    debug: verify every plan, log every collective really issued and compare all ranks' logs with the plan after each step. cost:
    path of the file that `pipemoe tune` wrote on this machine for this model; None, or a file of another machine or model, means
    costs derived from the device.
    """

    num_slots: int | None = None
    combine_dtype: str | None = None
    deterministic: bool = False
    experts: str = "auto"
    graph_tokens: int = 1024
    debug: bool = False
    cost: str | None = field(default=None, repr=False)  # what it holds is compared, not where it lies

    def __post_init__(self) -> None:
        if self.deterministic:
            object.__setattr__(self, "combine", "gather")
        if not isinstance(self.graph_tokens, int) or self.graph_tokens < 0:
            raise ConfigError(f"graph_tokens is {self.graph_tokens!r}; it must be a whole number of at least 0")
        if self.num_slots is None:
            replace(self, num_slots=1)  # everything else must be right already
            return
        PlanConfig.__post_init__(self)
        if self.cost is not None and not isinstance(self.cost, str):
            raise ConfigError(f"cost is {self.cost!r}; it must be the path of a file, or None")
        if self.combine_dtype is not None and self.combine_dtype not in DTYPES:
            raise ConfigError(f"combine_dtype is {self.combine_dtype!r}; it must be one of {', '.join(DTYPES)}, or None")

    def in_world(self, num_slots: int) -> Config:
        """With every value settled, in a world of `num_slots` slots. Raises ConfigError if it has fewer than asked for."""
        if self.num_slots is None:
            return replace(self, num_slots=num_slots)
        if self.num_slots > num_slots:
            raise ConfigError(f"num_slots is {self.num_slots}, but the world was started with {num_slots}; pass num_slots to pipemoe.init")
        return self
