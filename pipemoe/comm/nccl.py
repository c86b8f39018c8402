"""The GPU transport: grouped NCCL calls through cupy, a pair of communicators per cohort slot.

Operations on one communicator are one queue even across streams, so dispatch and combine of a slot have one each, and
cohorts never share any. A group of broadcasts is one operation to NCCL (since 2.29 one fused kernel).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from pipemoe.comm.transport import CallLog, WaveSums, gather_transfers, sum_in_rank_order
from pipemoe.errors import ConfigError, FatalError
from pipemoe.plan.room import Room
from pipemoe.plan.schedule import Wave

# Results that cupy has no name for: it raises a KeyError of the number.
_RESULTS = {6: "a peer has failed, or the network to it", 7: "in progress", 8: "timed out"}
_IN_PROGRESS = 7
_MOST_CTAS = 8  # thread blocks per communicator, unless NCCL_MAX_CTAS says otherwise


class NcclFailed(FatalError):
    """NCCL gave a result that cupy has no name for; a lost peer may be behind it."""


@contextlib.contextmanager
def _named(doing: str) -> Iterator[None]:
    """Raise a result that cupy has no name for as NcclFailed."""
    try:
        yield
    except KeyError as error:
        raise _failed(error, doing) from None


def _failed(error: KeyError, doing: str) -> Exception:
    """The error behind a KeyError of cupy's; any other KeyError stays as it is."""
    number = error.args[0] if error.args else None
    if type(number) is not int:
        return error
    cure = "; communicators must be blocking: unset NCCL_COMM_BLOCKING" if number == _IN_PROGRESS else ""
    return NcclFailed(f"NCCL: {_RESULTS.get(number, 'unknown result')} (result {number}) in {doing}{cure}")


def unique_ids(num_ids: int) -> list[bytes]:
    """`num_ids` new ids of communicators."""
    with _named("making ids of communicators"):
        return [library().get_unique_id() for _ in range(num_ids)]


def version() -> int:
    """The version of NCCL as one number: 22703 is 2.27.3."""
    with _named("asking for its version"):
        return library().get_version()


def library() -> Any:
    """cupy's NCCL module; ConfigError says what to install when there is none."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise ConfigError(
            f"several ranks on GPUs need cupy with NCCL ({error}); install pipemoe[cuda12] or pipemoe[cuda13]"
        ) from None
    if not nccl.available:
        raise ConfigError("cupy finds no NCCL library; install nvidia-nccl-cu12 (or -cu13) beside the cupy wheel")
    return nccl


def default_max_ctas(num_sms: int, num_slots: int, ranks_on_device: int) -> int:
    """Thread blocks per communicator that leave room for kernels (`Room`): at most 8, at least 1."""
    fitting = Room(num_sms, ctas=1, ranks_on_device=ranks_on_device).spinning_blocks // (
        ranks_on_device * 2 * num_slots
    )
    return max(1, min(_MOST_CTAS, fitting))


def max_ctas() -> int:
    """Thread blocks that one NCCL kernel may take. Only once a world with several ranks on GPUs is made."""
    return int(os.environ["NCCL_MAX_CTAS"])


class NcclTransport(CallLog):
    """`ids`: one NCCL unique id per communicator, 2 x num_slots of them, the same on all ranks."""

    def __init__(self, rank: int, size: int, ids: list[bytes]) -> None:
        import torch

        super().__init__()
        self._nccl = library()
        self.rank, self.size = rank, size
        self._types = {
            torch.float32: self._nccl.NCCL_FLOAT32,
            torch.float64: self._nccl.NCCL_FLOAT64,
            torch.float16: self._nccl.NCCL_FLOAT16,
            torch.bfloat16: self._nccl.NCCL_BFLOAT16,
        }
        with _named(f"making communicators of rank {rank}"):
            self._comms = [self._nccl.NcclCommunicator(size, unique_id, rank) for unique_id in ids]
        self._dispatch, self._combine = self._comms[0::2], self._comms[1::2]

    def dispatch(self, slot: int, buffer: int, wave: Wave, exchange: str, rows: Any) -> None:
        try:
            self._send(slot, buffer, wave, exchange, rows)
        except KeyError as error:
            raise _failed(error, f"dispatch of rank {self.rank}") from None

    def _send(self, slot: int, buffer: int, wave: Wave, exchange: str, rows: Any) -> None:
        comm, stream, row_bytes = self._dispatch[slot], _current_stream(), rows.shape[1]
        base, kind = rows.data_ptr(), self._nccl.NCCL_UINT8
        if exchange == "padded":
            block = wave.num_rows // self.size * row_bytes
            self._note("dispatch", slot, buffer, "all_gather", -1, block * self.size)
            comm.allGather(base + self.rank * block, base, block, kind, stream)
            return
        self._nccl.groupStart()
        for s in wave.segments:
            self._note("dispatch", slot, buffer, "broadcast", s.rank, s.num_rows * row_bytes)
            comm.bcast(base + s.row * row_bytes, s.num_rows * row_bytes, kind, s.rank, stream)
        self._nccl.groupEnd()

    def combine(self, slot: int, buffer: int, wave: Wave, exchange: str, combine: str, sums: WaveSums) -> None:
        try:
            if combine == "gather":
                self._gather(slot, buffer, wave, sums)
            elif exchange == "padded":
                self._reduce_scatter(slot, buffer, wave, sums)
            else:
                self._reduce(slot, buffer, wave, sums)
        except KeyError as error:
            raise _failed(error, f"combine of rank {self.rank}") from None

    def _reduce(self, slot: int, buffer: int, wave: Wave, sums: WaveSums) -> None:
        comm, stream, results, aside = self._combine[slot], _current_stream(), iter(sums.results), []
        base, width, size = sums.partial.data_ptr(), sums.partial.shape[1], sums.partial.element_size()
        kind = self._types[sums.partial.dtype]
        self._nccl.groupStart()
        for s in wave.segments:
            self._note("combine", slot, buffer, "reduce", s.rank, s.num_rows * width * size)
            source = base + s.row * width * size
            target = source  # only the root's is written
            if s.rank == self.rank:
                result = next(results)
                if result.is_contiguous():
                    target = result.data_ptr()
                else:
                    aside.append((result, sums.partial[s.row : s.row + s.num_rows]))
            comm.reduce(source, target, s.num_rows * width, kind, self._nccl.NCCL_SUM, s.rank, stream)
        self._nccl.groupEnd()
        for result, total in aside:
            result.copy_(total)

    def _reduce_scatter(self, slot: int, buffer: int, wave: Wave, sums: WaveSums) -> None:
        block = wave.num_rows // self.size
        own = sums.partial[self.rank * block : (self.rank + 1) * block]
        results = sums.results
        if [(len(r), r.dtype, r.is_contiguous()) for r in results] == [(block, own.dtype, True)]:
            (own,), results = results, ()  # no padding: straight to where they belong
        self._note("combine", slot, buffer, "reduce_scatter", -1, sums.partial.numel() * sums.partial.element_size())
        self._combine[slot].reduceScatter(
            sums.partial.data_ptr(),
            own.data_ptr(),
            own.numel(),
            self._types[own.dtype],
            self._nccl.NCCL_SUM,
            _current_stream(),
        )
        for result in results:
            result.copy_(own[: len(result)])

    def _gather(self, slot: int, buffer: int, wave: Wave, sums: WaveSums) -> None:
        comm, stream = self._combine[slot], _current_stream()
        self._nccl.groupStart()
        for primitive, peer, rows in gather_transfers(self.rank, self.size, wave, sums):
            self._note("combine", slot, buffer, primitive, peer, rows.nbytes)
            call = comm.send if primitive == "send" else comm.recv
            call(rows.data_ptr(), rows.nbytes, self._nccl.NCCL_UINT8, peer, stream)
        self._nccl.groupEnd()
        sum_in_rank_order(self.rank, wave, sums)

    def check(self) -> None:
        """Raise what NCCL noticed by itself (network errors; not a peer killed on NVLink)."""
        for comm in self._comms:
            try:
                comm.check_async_error()
            except KeyError as error:
                if error.args != (_IN_PROGRESS,):
                    raise _failed(error, f"the communicators of rank {self.rank}") from None

    def abort(self) -> None:
        """End the kernels of all communicators; may block, and must come before the communicators are dropped."""
        with _named(f"aborting communicators of rank {self.rank}"):
            for comm in self._comms:
                comm.abort()

    def close(self) -> None:
        """Give the communicators back, by NCCL's abort. Its destroy is a collective call, and would wait for ranks that
        still work.
        """
        self.abort()


def _current_stream() -> int:
    import torch

    # torch.cuda.current_stream() takes 20 microseconds
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
