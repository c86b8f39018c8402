"""How long a round takes, by the cost model: for lags, sizes of rounds, how many slots roll, and simulation.

A round is one cohort, so a formula does: layer by layer, the longest attention, then waves whose dispatches, experts
and combines overlap. The clock (plan.clock) is exact, but knows no chunks with earlier keys, and takes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipemoe.plan.cost.model import CostModel, attend_busy, experts_busy, first_busy, graph_rows, rates_of
from pipemoe.plan.schedule import ModelShape
from pipemoe.rolling.offer import Chunk

# Tokens of a rank in a long and a usual round, and of a sequence without much attention.
_MANY, _USUAL, _SHORT = 8192, 2048, 128
_LONG_ROUND = 8  # times what a round costs by itself
_PACE_ROUNDS = 8  # that a slot's pace is a mean of, recent ones more than others


class RoundTime:
    """Predicts rounds of one model on one set of ranks. Whole nanoseconds, the same on every rank."""

    def __init__(self, shape: ModelShape, cost: CostModel, num_ranks: int, moe_max_num_tokens: int) -> None:
        self._shape, self._num_ranks = shape, num_ranks
        self._rates: Any = rates_of(cost)
        self._wave_rows = moe_max_num_tokens
        self._cores = cost.cores.permille

    @property
    def shares_cores(self) -> bool:
        """Do ranks compute on cores that they share?"""
        return bool(self._cores)

    def of(self, admitted: Sequence[Sequence[Chunk]]) -> int:
        """ns that a round takes, alone, from its first operation to its end. admitted: the chunks of each rank; 0 if
        there are none.
        """
        return self._of_spans(_spans(admitted))[0]

    def busy(self, admitted: Sequence[Sequence[Chunk]]) -> list[int]:
        """ns of those in which each rank computes, or issues; where ranks share cores, on the cores of all."""
        return self._of_spans(_spans(admitted))[1]

    def of_tokens(self, tokens: int, start: int = 0) -> int:
        """ns of a round in which one rank has this many tokens of one sequence, which follow `start` others."""
        return self._of_spans([[(start, start + tokens)]])[0]

    def useful_slots(self) -> int:
        """How many slots' rounds gain by going on side by side. On cores as many as share none. On devices two, where a
        usual round leaves the ranks idle for a sixth of its time or more; else one, since two would only slow each
        other. By the clock, a third one brings 4 % at most, and slows the others.
        """
        if self._cores:
            return max(1, self._cores // (1000 * self._num_ranks))
        whole, busy = self._usual()
        return 2 if 5 * whole >= 6 * busy else 1

    def beside_rows(self) -> int:
        """From how much work on, in rows of one rank, a round is so long that others should go on beside it, although
        they slow each other down. 0: beside any; where a usual round leaves the ranks idle for half of its time or
        more, rounds side by side gain more than they lose. By simulation.
        """
        whole, busy = self._usual()
        return 0 if self._cores or whole >= 2 * busy else _LONG_ROUND * self.fixed_rows()

    def _usual(self) -> tuple[int, int]:
        """ns of a usual round, and those in which the ranks compute or issue."""
        whole, busy = self._of_spans([[(0, _SHORT)] * (_USUAL // _SHORT)] * self._num_ranks)
        return whole, max(busy)

    def fixed_rows(self) -> int:
        """How many rows on each rank take as long as what a round costs by itself, at least 1."""
        row, fixed = self._line()
        if self._cores:  # which agree on the next round as well: it cannot hide behind this one
            fixed += self._rates.start_ns
        return max(1, fixed // row)

    def pairs_per_row(self) -> int:
        """How many pairs of a query and a key it may see take as long as one row on each rank, at least 1."""
        pairs = 2 * _MANY * (_MANY + 1) // 2 - 4 * (_MANY // 2) * (_MANY // 2 + 1) // 2
        longer = self._of_all((_MANY, _MANY)) - self._of_all((_MANY // 2,) * 4)
        return max(1, self._line()[0] * pairs // max(1, longer))

    def _line(self) -> tuple[int, int]:
        """ns of a row on each rank, in long rounds of short sequences, and what such rounds take beside."""
        many, more = (self._of_all((_SHORT,) * (n // _SHORT)) for n in (_MANY, 2 * _MANY))
        row = max(1, (more - many) // _MANY)
        return row, max(0, many - _MANY * row)

    def _of_all(self, lengths: Sequence[int]) -> int:
        """ns of a round in which every rank has sequences of these lengths."""
        return self._of_spans([[(0, length) for length in lengths]] * self._num_ranks)[0]

    def _of_spans(self, spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[int, list[int]]:
        """Whole, and busy on each rank."""
        rates, num_layers = self._rates, self._shape.num_layers
        rows = [sum(stop - start for start, stop in of_rank) for of_rank in spans]
        total, owners = sum(rows), sum(n > 0 for n in rows)
        if total == 0:
            return 0, [0] * len(spans)
        pairs = [sum(stop * (stop + 1) - start * (start + 1) for start, stop in of_rank) // 2 for of_rank in spans]
        padded = [max(n, graph_rows(rates, n)) for n in rows]
        attends = [attend_busy(rates, n, p) if n else 0 for n, p in zip(padded, pairs)]
        firsts = [first_busy(rates, n, p) if n else 0 for n, p in zip(padded, pairs)]
        num_waves = -(-total // self._wave_rows)
        wave = -(-total // num_waves)
        calls = -(-owners // num_waves)
        experts = rates.experts_fixed_ns + self._on_cores(
            experts_busy(rates, wave, self._shape.num_experts, self._shape.top_k, self._num_ranks), self._num_ranks
        )
        dispatch = rates.dispatch_fixed_ns + calls * rates.dispatch_segment_ns + wave * rates.dispatch_row_ps // 1000
        combine = rates.combine_fixed_ns + calls * rates.combine_segment_ns + wave * rates.combine_row_ps // 1000
        attend = rates.attend_fixed_ns + self._shared(attends)
        layer = attend + dispatch + experts + combine + (num_waves - 1) * max(dispatch, experts, combine)
        issue = rates.host_graph_ns if max(rows) <= rates.host_graph_rows else rates.host_attend_ns
        issue += rates.host_pack_ns + num_waves * (
            rates.host_dispatch_ns + rates.host_experts_ns + rates.host_combine_ns
        )
        whole = num_layers * max(layer, issue) + self._shared(firsts) + rates.finish_ns
        if self._cores:
            attends, firsts = ([sum(of) * 1000 // self._cores] * len(spans) for of in (attends, firsts))
        computing = num_layers * num_waves * (experts - rates.experts_fixed_ns)
        issuing = 0 if self._cores else num_layers * issue
        return whole, [min(whole, max(issuing, num_layers * a + computing + f)) for a, f in zip(attends, firsts)]

    def _shared(self, works: Sequence[int]) -> int:
        """ns until all of these are done, each by its own rank."""
        longest, total = max(works), sum(works)
        if self._cores:
            return max(longest, total * 1000 // self._cores)
        if self._num_ranks == 1:
            return longest
        others = min(longest, (total - longest) // (self._num_ranks - 1))
        return longest + others * self._rates.attend_crowd_permille // 1000

    def _on_cores(self, work: int, num_ranks: int) -> int:
        """ns that work takes which so many ranks do at once."""
        return max(work, work * num_ranks * 1000 // self._cores) if self._cores else work


class Pace:
    """How long one slot's rounds take on this rank, in times of their predictions. These may all be off by the same
    factor; a round is late beside the rounds before it.
    """

    def __init__(self) -> None:
        self._usual = 0.0  # seconds of a predicted second; 0: nothing is known yet

    def note(self, seconds: float, predicted: float) -> None:
        """A round has taken so long."""
        if predicted > 0:
            ratio = seconds / predicted
            self._usual += (ratio - self._usual) / (_PACE_ROUNDS if self._usual else 1)

    def lag(self, seconds: float, predicted: float) -> int:
        """How long a round under way has taken, in thousandths of what is expected of it; 0 while nothing is known."""
        expected = self._usual * predicted
        return int(1000 * seconds / expected) if expected > 0 else 0


def _spans(admitted: Sequence[Sequence[Chunk]]) -> list[list[tuple[int, int]]]:
    return [[(chunk.start, chunk.stop) for chunk in chunks] for chunks in admitted]
