"""The exchanges that benchmarks/comm times: each with its wave, buffers of data that can be checked, and its call.

Grouped broadcast and padded all-gather bring rows to every rank (bytes). Grouped reduce, reduce-scatter and gather
bring sums to the rows' owners. All go through pipemoe's own transport, on the communicators of slot 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pipemoe.comm.transport import WaveSums
from pipemoe.plan.schedule import Segment, Wave

if TYPE_CHECKING:
    import torch

    from pipemoe import World

SKEW = 256  # rows of rank 0 for one of every other rank, as in [4096, 16, 16, 16]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One kind of exchange. scattered: nccl-tests' bus-bandwidth factor is (R - 1) / R, otherwise 1."""

    name: str
    padded: bool
    combine: str | None  # None: a dispatch
    scattered: bool

    def bus_factor(self, num_ranks: int) -> float:
        """Broadcast and reduce: 1; all-gather, reduce-scatter, gather: (R - 1) / R (nccl-tests, doc/PERFORMANCE.md)."""
        return (num_ranks - 1) / num_ranks if self.scattered else 1.0


EXCHANGES = {
    e.name: e
    for e in (
        Exchange("grouped_broadcast", False, None, False),
        Exchange("all_gather", True, None, True),
        Exchange("grouped_reduce", False, "reduce", False),
        Exchange("reduce_scatter", True, "reduce", True),
        Exchange("gather_combine", False, "gather", True),
    )
}


def rank_rows(num_rows: int, num_ranks: int, counts: str) -> list[int]:
    """`num_rows` rows dealt to the ranks: "equal", or "skewed" (rank 0 has nearly all)."""
    shares = [SKEW if counts == "skewed" and rank == 0 else 1 for rank in range(num_ranks)]
    ends = [num_rows * part // sum(shares) for part in accumulate(shares)]
    return [end - begin for begin, end in zip([0, *ends], ends)]


def wave_of(rows: list[int], padded: bool) -> Wave:
    """The wave with rows[r] rows of rank r; padded: each padded to the longest."""
    block = max(rows)
    begins = [rank * block for rank in range(len(rows))] if padded else [0, *accumulate(rows)]
    segments = tuple(Segment(rank, 0, count, begin) for rank, (count, begin) in enumerate(zip(rows, begins)) if count)
    return Wave(segments, block * len(rows) if padded else sum(rows))


class Case:
    """An exchange on `rows` (per rank) of `width` elements, on this rank.

    Every element that a rank sends is a small whole number, a function of owner, row and column (and, for sums, of the
    sender). It is exact in every dtype, so every element that arrives has one right value.
    """

    def __init__(self, world: World, exchange: Exchange, rows: list[int], width: int, dtype: torch.dtype) -> None:
        import torch

        self._world, self._exchange, self._rows, self._width, self._dtype = world, exchange, rows, width, dtype
        self._wave = wave_of(rows, exchange.padded)
        self._buffer = torch.empty((self._wave.num_rows, width), dtype=dtype, device=world.device)
        own = rows[world.rank]
        self._results: list[torch.Tensor] = []
        self._sums = None
        if exchange.combine is not None:
            self._results = [torch.empty((own, width), dtype=dtype, device=world.device)] if own else []
            staging = None
            if exchange.combine == "gather":
                staging = torch.empty((world.size - 1, own, width), dtype=dtype, device=world.device)
            self._sums = WaveSums(self._buffer, self._results, staging)

    def fill(self) -> None:
        """Write data where it is sent from, and wrong values where it is to arrive."""
        self._buffer.fill_(99)
        for result in self._results:
            result.fill_(99)
        for segment in self._wave.segments:
            if self._sums is not None or segment.rank == self._world.rank:
                sender = self._world.rank if self._sums is not None else None
                self._part(segment).copy_(self._expected(segment, [sender]))

    def call(self) -> Callable[[], Any]:
        """The work of one exchange, to be submitted to a lane of slot 0."""
        transport, exchange = self._world.transport, "padded" if self._exchange.padded else "broadcast"
        if self._sums is None:
            return lambda: transport.dispatch(0, 0, self._wave, exchange, self._buffer)
        return lambda: transport.combine(0, 0, self._wave, exchange, self._exchange.combine, self._sums)

    def num_wrong(self) -> int:
        """Elements on this rank that are not what they must be after one exchange."""
        if self._sums is None:
            return sum(int((self._part(s) != self._expected(s, [None])).sum()) for s in self._wave.segments)
        own = [s for s in self._wave.segments if s.rank == self._world.rank]
        every = list(range(self._world.size))
        return sum(
            int((result != self._expected(s, every)).sum()) for s, result in zip(own, self._results, strict=True)
        )

    def _part(self, segment: Segment) -> torch.Tensor:
        return self._buffer[segment.row : segment.row + segment.num_rows]

    def _expected(self, segment: Segment, senders: list[int | None]) -> torch.Tensor:
        """The sum over senders of what they send of `segment` [rows, width]; at most 4 per sender."""
        import torch

        def thirds(count: int) -> torch.Tensor:
            return (torch.arange(count, device=self._world.device) % 3).to(torch.uint8)

        pattern = (thirds(segment.num_rows)[:, None] + thirds(self._width) + segment.rank % 3) % 3
        weight = sum(1 if sender is None else 1 + sender % 2 for sender in senders)
        return (pattern * weight).to(self._dtype)
