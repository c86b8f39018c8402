"""The source seam: where a run's tokens come from and where their results go, on this rank.

`attend` and `finish` are called as work of the cohort's compute lane, `rows` there as well, `results` when a combine is
posted. Cohorts are named by their index in the plan; only cohorts that hold tokens of this rank are asked for.
Gradients are off in all of them. What any of them raises fails its cohort's rows on this rank, not the step: the caller
hears of it, and every rank at the next step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from pipemoe.plan.schedule import Plan
    from pipemoe.runtime.lanes import Event


class Source(Protocol):
    has_side_work: bool  # does `side_work` do anything?

    def begin(self, plan: Plan, rank: int) -> None:
        """Once, before the first operation."""

    def ready(self, cohort: int, layer: int) -> bool:
        """May `attend(cohort, layer)` be issued now? False makes the engine come back later."""

    def attend(self, cohort: int, layer: int) -> None:
        """Take in the results of layer - 1 and produce this layer's rows."""

    def rows(self, cohort: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [n, H], ids [n, K] int32, weights [n, K] float32 of this rank's tokens [start, stop)."""

    def side_work(self, cohort: int) -> None:
        """What needs no experts of other ranks, such as shared experts: runs in the compute lane while rows are
        dispatched.
        """

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        """Where the sums of tokens [start, stop) go: [n, H], contiguous."""

    def combined(self, cohort: int, layer: int, event: Event) -> None:
        """A combine that writes results of this rank has been issued; `event` closes it."""

    def finish(self, cohort: int) -> None:
        """Take in the results of the last layer."""

    def finished(self, cohort: int, seconds: float) -> None:
        """`finish` is complete; it was so at `seconds` of time.perf_counter."""
