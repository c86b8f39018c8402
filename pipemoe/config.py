"""The user's configuration: how to plan, and how to compute and check."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import shown
from pipemoe.errors import ConfigError, PipemoeError, describe
from pipemoe.plan.config import PlanConfig, check_count

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
DISPATCH_DTYPES = ("float8_e4m3fn",)
ATTENTIONS = ("auto", "fused", "transformers")


@dataclass(frozen=True, slots=True)
class Config(PlanConfig):
    """The settings of PlanConfig, and these:

    num_slots: cohorts under way at once. None takes as many as the world was started with.

    dispatch_dtype: the dtype in which hidden values travel to the experts. "float8_e4m3fn" takes half the bytes of
    bfloat16, with a scale for each 128 values (H must be a multiple of 128). None takes the dtype that the experts
    compute in: the model's, or float8_e4m3fn for experts="hopper_fp8".

    combine_dtype: the dtype in which partial sums travel: "float32", "bfloat16" or "float16". None takes the model's on
    a GPU, float32 on the host.

    deterministic: equal rows give bitwise equal MoE results, whatever the mode, cohorts, waves and ranks. Sums are
    float64 on a fixed grid (multiples of 2^-32), and `combine` is always "gather".

    experts: "auto", or the name of an implementation.

    attention: "fused" runs a model's attention by kernels of pipemoe and of libraries, one for each step of a layer;
    "transformers" by the modules of the model in transformers. "auto" is fused where that serves: on a GPU in a 16-bit
    dtype, on the host in float32, and for families that state what their attention is made of. Layers of callers
    (PipelinedMoE) have none.

    graph_tokens: on a GPU, attention on up to about this many tokens of a cohort is launched as CUDA graphs, which are
    captured when the model is made. The number is rounded up to one of pipemoe.plan.cost.model.GRAPH_ROWS, or down to
    the largest. Where a rank has no peers, a step of up to 1024 tokens in one cohort is one graph. 0: no graphs.

    debug: verify every plan, log every collective, and compare all ranks' logs with the plan after each step.

    cost: path (str or os.PathLike) of a file that `pipemoe tune` wrote on this machine for this model and
    configuration (tune has --combine and --deterministic). None derives costs from the device. So does, with a warning,
    a file of another machine or model, or a file that is no cost file. A missing file is a ConfigError on every rank.
    """

    num_slots: int | None = None  # type: ignore[assignment]  # wider than a plan's: None until `in_world`
    dispatch_dtype: str | None = None
    combine_dtype: str | None = None
    deterministic: bool = False
    experts: str = "auto"
    attention: str = "auto"
    graph_tokens: int = 4096
    debug: bool = False
    # left out of the comparison between ranks: the file's content counts, not its path
    cost: str | os.PathLike[str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            self._check()
        except PipemoeError:
            raise
        except Exception as error:  # comparing a caller's value may raise anything
            raise ConfigError(f"a setting cannot be looked at: {describe(error)}") from error

    def _check(self) -> None:
        for name in ("deterministic", "debug"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.deterministic:
            object.__setattr__(self, "combine", "gather")
        check_count("graph_tokens", self.graph_tokens, 0)
        if self.num_slots is None:
            replace(self, num_slots=1)  # everything else must be right already
            return
        PlanConfig.__post_init__(self)
        if not isinstance(self.experts, str):
            raise ConfigError(
                f"experts is a {type(self.experts).__name__}; it must be 'auto', or the implementation by name"
            )
        if not isinstance(self.attention, str) or self.attention not in ATTENTIONS:
            raise ConfigError(f"attention is {shown(self.attention)}; it must be one of {', '.join(ATTENTIONS)}")
        if self.cost is not None and not isinstance(self.cost, (str, os.PathLike)):
            raise ConfigError(f"cost is {shown(self.cost)}; it must be the path of a file, or None")
        if self.dispatch_dtype is not None and self.dispatch_dtype not in DISPATCH_DTYPES:
            raise ConfigError(
                f"dispatch_dtype is {self.dispatch_dtype!r}; it must be one of {', '.join(DISPATCH_DTYPES)}, or None"
            )
        if self.combine_dtype is not None and self.combine_dtype not in DTYPES:
            raise ConfigError(
                f"combine_dtype is {self.combine_dtype!r}; it must be one of {', '.join(DTYPES)}, or None"
            )

    def in_world(self, num_slots: int) -> Config:
        """This configuration with num_slots settled, in a world of `num_slots` slots.

        Raises ConfigError if the world has too few.
        """
        if self.num_slots is None:
            return replace(self, num_slots=num_slots)
        if self.num_slots > num_slots:
            raise ConfigError(
                f"num_slots is {self.num_slots}, but the world was started with {num_slots}; pass num_slots to "
                "pipemoe.init"
            )
        return self

    @property
    def torch_dispatch_dtype(self) -> torch.dtype | None:
        """dispatch_dtype as torch's, or None."""
        import torch

        return None if self.dispatch_dtype is None else getattr(torch, self.dispatch_dtype)


def check_config(config: Any, rank: str) -> None:
    """Raise ConfigError unless `config` is one. rank: "rank 0: ", for the message."""
    if not isinstance(config, Config):
        raise ConfigError(f"{rank}config is a {type(config).__name__}; it must be a pipemoe.Config")
