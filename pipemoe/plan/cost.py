"""What an operation is taken to cost when the total order is made: whole nanoseconds, so that every rank agrees.

These defaults only rank operations (a short cohort's before a long one's); they are not a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OpCost:
    """An operation on n rows takes `fixed_ns + n * row_ns`."""

    fixed_ns: int
    row_ns: int

    def __call__(self, rows: int) -> int:
        return self.fixed_ns + rows * self.row_ns


@dataclass(frozen=True, slots=True)
class CostModel:
    """Costs per kind; attend counts the rows of the rank that has most of the cohort's."""

    attend: OpCost = OpCost(100_000, 200)
    dispatch: OpCost = OpCost(30_000, 20)
    experts: OpCost = OpCost(100_000, 100)
    combine: OpCost = OpCost(30_000, 20)
