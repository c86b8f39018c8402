"""The transport seam: how a wave's rows travel. Implementations: `local` (one rank), `mpi` (host), `nccl` (GPUs).

`dispatch` and `combine` are called as work of the slot's dispatch or combine lane, on every rank in the plan's order.
On a GPU they enqueue on the current stream and return None; on the host they post and return a function that tests for
completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipemoe.plan.projection import Issue, gather_calls
from pipemoe.plan.schedule import Wave

if TYPE_CHECKING:
    import torch

Test = Callable[[], bool]


@dataclass(frozen=True, slots=True)
class WaveSums:
    """The buffers of one combine on this rank. n rows of the wave, m of them this rank's own."""

    partial: torch.Tensor  # [n, H] this rank's partial sums, contiguous; a reduce may leave sums there
    # per own segment, in the wave's order: [segment rows, H], written by the combine
    results: Sequence[torch.Tensor]
    staging: torch.Tensor | None  # [R - 1, >= m, H] peers' partial sums, contiguous, for combine="gather"


class Transport(Protocol):
    """Moves waves between ranks. `slot` picks the pair of communicators; `buffer` is only logged."""

    def dispatch(self, slot: int, buffer: int, wave: Wave, exchange: str, rows: torch.Tensor) -> Test | None:
        """Bring every segment's rows to every rank. rows: [wave.num_rows, row_bytes] uint8, with this rank's own rows
        written.
        """

    def combine(self, slot: int, buffer: int, wave: Wave, exchange: str, combine: str, sums: WaveSums) -> Test | None:
        """Sum the ranks' partial sums of every segment into its owner's results."""

    def start_log(self) -> None:
        """Remember every call that is really issued from now on."""

    def take_log(self) -> list[Issue]:
        """The calls since `start_log`, in order; remembers none from now on."""

    def check(self) -> None:
        """Raise an error that the library has found by itself."""

    def abort(self) -> None:
        """End all that is under way; may block."""

    def close(self) -> None:
        """Give everything back. Only when nothing is under way."""


class CallLog:
    """The part of a transport that remembers its calls for `verify` (debug)."""

    def __init__(self) -> None:
        self.log: list[Issue] | None = None

    def start_log(self) -> None:
        """Remember every call from now on."""
        self.log = []

    def take_log(self) -> list[Issue]:
        """The calls since `start_log`; remembers none from now on."""
        log, self.log = self.log or [], None
        return log

    def _note(self, communicator: str, slot: int, buffer: int, primitive: str, peer: int, num_bytes: int) -> None:
        if self.log is not None:
            self.log.append(Issue(communicator, slot, buffer, primitive, peer, num_bytes))


class LocalTransport(CallLog):
    """The transport of a world of one: rows are already there."""

    def dispatch(self, slot: int, buffer: int, wave: Wave, exchange: str, rows: torch.Tensor) -> None:
        pass

    def combine(self, slot: int, buffer: int, wave: Wave, exchange: str, combine: str, sums: WaveSums) -> None:
        for segment, result in zip(wave.segments, sums.results, strict=True):
            self._copy(sums.partial[segment.row : segment.row + segment.num_rows], result)

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def onto(self, tape: Any) -> LocalTransport:
        """This transport with a combine that is written onto a tape (pipemoe_kernels.launch.tape), and raises
        NotRecordable for copies that only torch can make.
        """
        return _LocalTapeTransport(tape)

    def check(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


class _LocalTapeTransport(LocalTransport):
    """See LocalTransport.onto."""

    def __init__(self, tape: Any) -> None:
        super().__init__()
        self._tape = tape

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        import torch

        from pipemoe_kernels.launch import driver
        from pipemoe_kernels.launch.kernel import Stream
        from pipemoe_kernels.launch.tape import NotRecordable

        if source.dtype != target.dtype or not (source.is_contiguous() and target.is_contiguous()):
            raise NotRecordable("a copy that converts or gathers")
        stream = Stream.current(torch.device(source.device)).handle
        copy = driver.function("cuMemcpyDtoDAsync_v2")
        self._tape.call(copy, target.data_ptr(), source.data_ptr(), source.nbytes, stream)


def gather_transfers(rank: int, num_ranks: int, wave: Wave, sums: WaveSums) -> Iterator[tuple[str, int, torch.Tensor]]:
    """This rank's calls for combine="gather", in order: "send" or "recv", the other rank, the rows [n, H] to read or
    write.

    The staging holds one block for each peer, in rank order; each block has this rank's segments in the wave's order.
    """
    at = dict.fromkeys(range(num_ranks), 0)
    staging = sums.staging
    for primitive, peer, segment in gather_calls(wave, rank, num_ranks):
        if primitive == "send":
            yield primitive, peer, sums.partial[segment.row : segment.row + segment.num_rows]
        else:
            assert staging is not None  # combine="gather" on several ranks has one
            yield primitive, peer, staging[peer - (peer > rank), at[peer] : at[peer] + segment.num_rows]
            at[peer] += segment.num_rows


def sum_in_rank_order(rank: int, wave: Wave, sums: WaveSums) -> None:
    """Add own and staged partial sums in ascending rank order, in float32 (float64 sums stay float64 until rounded
    once).
    """
    import torch

    at, staging = 0, sums.staging
    assert staging is not None  # combine="gather" on several ranks has one
    for segment, result in zip((s for s in wave.segments if s.rank == rank), sums.results, strict=True):
        own = sums.partial[segment.row : segment.row + segment.num_rows]
        staged = staging[:, at : at + segment.num_rows]
        at += segment.num_rows
        wide = torch.float64 if own.dtype == torch.float64 else torch.float32
        first, *others = (own if peer == rank else staged[peer - (peer > rank)] for peer in range(len(staged) + 1))
        total = first.to(wide, copy=True)
        for part in others:
            total.add_(part)
        result.copy_(total)
