"""The host transport: non-blocking MPI collectives, a pair of duplicated communicators per cohort slot.

MPI has no bfloat16: dispatch moves bytes, and partial sums are float32 for reduce (float64 and others for gather).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipemoe.comm.transport import CallLog, Test, WaveSums, gather_transfers, sum_in_rank_order
from pipemoe.errors import ConfigError
from pipemoe.plan.schedule import Wave

if TYPE_CHECKING:
    import torch

    Message = tuple[int, torch.Tensor]  # the other rank, and the rows


class Communicators:
    """This process's duplicates of COMM_WORLD. All its worlds use them, one after another.

    They are never freed: MPI has few communicators, but freeing one is a collective call, which a rank may miss. A
    world that ended well leaves nothing under way on them.
    """

    def __init__(self, world: Any) -> None:
        self.world = world  # for exchanges
        self._pairs: list[tuple[Any, Any]] = []
        self._of_rounds: list[Any] = []

    def pairs(self, num_slots: int) -> list[tuple[Any, Any]]:
        """For dispatch and combine of each slot. Every rank calls, with the same number."""
        while len(self._pairs) < num_slots:
            self._pairs.append((self.world.Dup(), self.world.Dup()))
        return self._pairs[:num_slots]

    def for_rounds(self, num_slots: int) -> list[Any]:
        """For the exchanges of each slot's rounds. Every rank calls, with the same number."""
        while len(self._of_rounds) < num_slots:
            self._of_rounds.append(self.world.Dup())
        return self._of_rounds[:num_slots]


class MpiTransport(CallLog):
    """Posts in plan order; the conductor tests (MPI calls here never block)."""

    def __init__(self, communicators: Communicators, num_slots: int) -> None:
        from mpi4py import MPI

        super().__init__()
        self._mpi = MPI
        self.rank, self.size = communicators.world.Get_rank(), communicators.world.Get_size()
        self._dispatch, self._combine = zip(*communicators.pairs(num_slots), strict=True)

    def dispatch(self, slot: int, buffer: int, wave: Wave, exchange: str, rows: Any) -> Test:
        comm, memory = self._dispatch[slot], rows.numpy()
        if exchange == "padded":
            self._note("dispatch", slot, buffer, "all_gather", -1, memory.nbytes)
            return self._test([comm.Iallgather(self._mpi.IN_PLACE, memory.reshape(-1))])
        requests = []
        for s in wave.segments:
            part = memory[s.row : s.row + s.num_rows]
            self._note("dispatch", slot, buffer, "broadcast", s.rank, part.nbytes)
            requests.append(comm.Ibcast(part, root=s.rank))
        return self._test(requests)

    def combine(self, slot: int, buffer: int, wave: Wave, exchange: str, combine: str, sums: WaveSums) -> Test:
        comm = self._combine[slot]
        if combine == "gather":
            return self._gather(comm, slot, buffer, wave, sums)
        if exchange == "padded":
            return self._reduce_scatter(comm, slot, buffer, wave, sums)
        return self._reduce(comm, slot, buffer, wave, sums)

    def _reduce(self, comm: Any, slot: int, buffer: int, wave: Wave, sums: WaveSums) -> Test:
        memory, results, requests, aside = _numeric(sums.partial), iter(sums.results), [], []
        for s in wave.segments:
            part, result = memory[s.row : s.row + s.num_rows], next(results) if s.rank == self.rank else None
            self._note("combine", slot, buffer, "reduce", s.rank, part.nbytes)
            if result is None:
                buffers = part, None
            elif result.is_contiguous():
                buffers = part, _numeric(result)
            else:  # summed in place
                buffers = self._mpi.IN_PLACE, part
                aside.append((_numeric(result), part))
            requests.append(comm.Ireduce(*buffers, op=self._mpi.SUM, root=s.rank))
        done = self._test(requests, sums)

        def test() -> bool:
            if not done():
                return False
            for result, total in aside:
                result[:] = total
            return True

        return test if aside else done

    def _reduce_scatter(self, comm: Any, slot: int, buffer: int, wave: Wave, sums: WaveSums) -> Test:
        memory = _numeric(sums.partial)
        # In place, MPI writes the sums of this rank's block over the first block.
        own = sums.partial[: wave.num_rows // self.size]
        self._note("combine", slot, buffer, "reduce_scatter", -1, memory.nbytes)
        done = self._test([comm.Ireduce_scatter_block(self._mpi.IN_PLACE, memory, op=self._mpi.SUM)])

        def test() -> bool:
            if not done():
                return False
            for result in sums.results:
                result.copy_(own[: len(result)])
            return True

        return test

    def _gather(self, comm: Any, slot: int, buffer: int, wave: Wave, sums: WaveSums) -> Test:
        requests = []
        for primitive, peer, rows in gather_transfers(self.rank, self.size, wave, sums):
            self._note("combine", slot, buffer, primitive, peer, rows.nbytes)
            requests.append(
                comm.Isend(_bytes(rows), dest=peer) if primitive == "send" else comm.Irecv(_bytes(rows), source=peer)
            )
        done = self._test(requests)

        def test() -> bool:
            if not done():
                return False
            sum_in_rank_order(self.rank, wave, sums)
            return True

        return test

    def _test(self, requests: list[Any], *buffers: Any) -> Test:
        """The test keeps the buffers alive: MPI reads and writes them until it returns True."""

        def test(buffers: tuple[Any, ...] = buffers) -> bool:
            return self._mpi.Request.Testall(requests)

        return test

    def check(self) -> None:
        """MPI's calls raise by themselves."""

    def abort(self) -> None:
        """Nothing to end: no MPI call here blocks, and the process's exit is what the launcher sees."""

    def close(self) -> None:
        """Nothing to free: the communicators are kept for the next world."""


class HostLinks:
    """Moves rows and sums between ranks of different hosts, where ranks of one host share memory: a message for each
    pair of ranks, by the same communicators. Only the conductor calls.
    """

    def __init__(self, communicators: Communicators, num_slots: int, others: Sequence[int]) -> None:
        """others: the ranks of other hosts, in order."""
        from mpi4py import MPI

        self.others, self._pairs, self._test_all = tuple(others), communicators.pairs(num_slots), MPI.Request.Testall

    def move(self, slot: int, kind: str, sends: Sequence[Message], receives: Sequence[Message]) -> Test:
        """Post messages of a wave. Between two ranks they match in the order in which they are posted.

        kind: "dispatch" or "combine". sends: to whom, and what. receives: from whom, and where it goes to. All tensors
        are contiguous and stay as they are until the test has returned True.
        """
        comm = self._pairs[slot][kind == "combine"]
        requests = [comm.Irecv(_bytes(rows), source=peer) for peer, rows in receives]
        requests += [comm.Isend(_bytes(rows), dest=peer) for peer, rows in sends]
        return lambda: self._test_all(requests)


def _bytes(tensor: Any) -> Any:
    """The memory of contiguous rows as bytes."""
    import torch

    return tensor.view(torch.uint8).numpy()


def _numeric(tensor: Any) -> Any:
    try:
        return tensor.numpy()
    except TypeError:
        raise ConfigError(f"MPI cannot sum {tensor.dtype}; use combine_dtype=float32, or combine='gather'") from None
