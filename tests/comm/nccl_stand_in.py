"""A stand-in for NCCL: the ranks are threads of one process, and memory is the host's.

Once all ranks have called, it moves and sums what it is told to. It fails on what NCCL forbids, or would answer with a
wrong result, a crash or a standstill: collectives that differ between ranks, sends that no receive meets, groups that
are open or nested, memory of nobody, and writes of one group that overlap.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

STREAM = 7  # on which all calls must come
_KINDS = {
    "UINT8": torch.uint8,
    "FLOAT32": torch.float32,
    "FLOAT64": torch.float64,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
}
_PATIENCE = 60  # seconds for ranks that come late: only a fault takes so long


class Call(NamedTuple):
    """count: values of `kind` that a rank sends, or receives. peer: the root, or the other side; -1 for all ranks."""

    name: str
    communicator: bytes
    send: int | None
    receive: int | None
    count: int
    kind: str
    peer: int


class StandIn:
    """What the ranks' libraries share; `memory[rank]` are the contiguous tensors that calls of a rank may touch."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.libraries = [Library(self, rank) for rank in range(num_ranks)]
        self.memory: list[list[torch.Tensor]] = [[] for _ in range(num_ranks)]
        self.aborted: list[tuple[int, bytes]] = []  # rank and communicator
        self.checked: list[tuple[int, bytes]] = []
        self._calls: list[list[Call]] = [[] for _ in range(num_ranks)]
        self._meeting = threading.Barrier(num_ranks, self._do, timeout=_PATIENCE)

    def on_every_rank(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` of all ranks side by side; what they return. Afterwards no group may be open."""

        def guarded(rank: int) -> Any:
            try:
                return work(rank)
            except BaseException:
                self._meeting.abort()
                raise

        with ThreadPoolExecutor(self.num_ranks) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.num_ranks)]
        errors = [f.exception() for f in futures if f.exception() is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        for library in self.libraries:
            assert library.group is None, f"rank {library.rank}: a group is still open"
        return [f.result() for f in futures]

    def meet(self, rank: int, calls: list[Call]) -> None:
        """Come with the calls of one group; back once they are done on all ranks."""
        self.libraries[rank].groups.append(calls)
        self._calls[rank] = calls
        self._meeting.wait()

    def _do(self) -> None:
        """All ranks' groups at once: everything is read before anything is written."""
        writes: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in self._calls]
        self._do_collectives(writes)
        self._do_transfers(writes)
        for rank, of_rank in enumerate(writes):
            ranges = sorted((to.data_ptr(), to.data_ptr() + to.numel() * to.element_size()) for to, _ in of_rank)
            for (_, end), (begin, _) in zip(ranges, ranges[1:]):
                assert end <= begin, f"rank {rank}: two calls of one group write to the same memory"
            for to, values in of_rank:
                to.copy_(values)

    def _do_collectives(self, writes: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        collectives = [[c for c in calls if c.name not in ("send", "recv")] for calls in self._calls]
        alike = [[(c.name, c.communicator, c.count, c.kind, c.peer) for c in calls] for calls in collectives]
        assert all(of_rank == alike[0] for of_rank in alike), f"the ranks call different collectives: {alike}"
        for calls in zip(*collectives):
            name, _, _, _, count, kind, root = calls[0]
            sent = [
                self._memory(rank, c.send, count * (self.num_ranks if name == "reduceScatter" else 1), kind)
                for rank, c in enumerate(calls)
            ]
            if name == "bcast":
                for rank, call in enumerate(calls):
                    if rank != root:
                        writes[rank].append((self._memory(rank, call.receive, count, kind), sent[root].clone()))
            elif name == "reduce":
                writes[root].append((self._memory(root, calls[root].receive, count, kind), _sum(sent)))
            elif name == "allGather":
                for rank, call in enumerate(calls):
                    assert call.send == call.receive + rank * sent[rank].nbytes, (
                        f"rank {rank}: allGather neither in place nor apart"
                    )
                    writes[rank].append(
                        (self._memory(rank, call.receive, count * self.num_ranks, kind), torch.cat(sent))
                    )
            else:
                for rank, call in enumerate(calls):
                    received = self._memory(rank, call.receive, count, kind)
                    apart = not call.send < call.receive + received.nbytes <= call.send + sent[rank].nbytes
                    assert apart or call.receive == call.send + rank * received.nbytes, (
                        f"rank {rank}: reduceScatter neither in place nor apart"
                    )
                    writes[rank].append((received, _sum(sent)[rank * count : (rank + 1) * count].clone()))

    def _do_transfers(self, writes: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        for source in range(self.num_ranks):
            for target in range(self.num_ranks):
                sends = [c for c in self._calls[source] if c.name == "send" and c.peer == target]
                receives = [c for c in self._calls[target] if c.name == "recv" and c.peer == source]
                alike = [[c[1:2] + c[4:6] for c in calls] for calls in (sends, receives)]
                assert alike[0] == alike[1], (
                    f"rank {source} sends {alike[0]} to rank {target}, which receives {alike[1]}"
                )
                for send, receive in zip(sends, receives):
                    values = self._memory(source, send.send, send.count, send.kind).clone()
                    writes[target].append((self._memory(target, receive.receive, receive.count, receive.kind), values))

    def _memory(self, rank: int, address: int, count: int, kind: str) -> torch.Tensor:
        """`count` values at an address of a rank's memory."""
        num_bytes = count * _KINDS[kind].itemsize
        for tensor in self.memory[rank]:
            begin = address - tensor.data_ptr()
            if 0 <= begin and begin + num_bytes <= tensor.nbytes:
                return tensor.view(-1).view(torch.uint8)[begin : begin + num_bytes].view(_KINDS[kind])
        raise AssertionError(f"rank {rank}: {num_bytes} bytes at {address} are in none of its buffers")


def _sum(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class Library:
    """One rank's `cupy.cuda.nccl`; `groups` are the calls that it has made, group by group."""

    NCCL_SUM = "SUM"

    def __init__(self, shared: StandIn, rank: int) -> None:
        self.shared, self.rank = shared, rank
        self.group: list[Call] | None = None  # that is open
        self.groups: list[list[Call]] = []
        for kind in _KINDS:
            setattr(self, f"NCCL_{kind}", kind)

    def NcclCommunicator(self, size: int, unique_id: bytes, rank: int) -> Communicator:  # noqa: N802  (cupy's name)
        assert (size, rank) == (self.shared.num_ranks, self.rank)
        return Communicator(self, unique_id)

    def groupStart(self) -> None:  # noqa: N802
        assert self.group is None, f"rank {self.rank}: a group begins inside a group"
        self.group = []

    def groupEnd(self) -> None:  # noqa: N802
        assert self.group is not None, f"rank {self.rank}: a group ends that has not begun"
        calls, self.group = self.group, None
        self.shared.meet(self.rank, calls)

    def call(self, call: Call, stream: int) -> None:
        assert stream == STREAM, f"rank {self.rank}: {call.name} on stream {stream}"
        if self.group is None:
            self.shared.meet(self.rank, [call])
        else:
            self.group.append(call)


class Communicator:
    """cupy's names and order of arguments."""

    def __init__(self, library: Library, name: bytes) -> None:
        self._library, self._name = library, name

    def bcast(self, buffer, count, kind, root, stream):
        self._library.call(Call("bcast", self._name, buffer, buffer, count, kind, root), stream)

    def reduce(self, send, receive, count, kind, op, root, stream):
        assert op == Library.NCCL_SUM
        self._library.call(Call("reduce", self._name, send, receive, count, kind, root), stream)

    def allGather(self, send, receive, count, kind, stream):  # noqa: N802
        self._library.call(Call("allGather", self._name, send, receive, count, kind, -1), stream)

    def reduceScatter(self, send, receive, count, kind, op, stream):  # noqa: N802
        assert op == Library.NCCL_SUM
        self._library.call(Call("reduceScatter", self._name, send, receive, count, kind, -1), stream)

    def send(self, buffer, count, kind, peer, stream):
        self._library.call(Call("send", self._name, buffer, None, count, kind, peer), stream)

    def recv(self, buffer, count, kind, peer, stream):
        self._library.call(Call("recv", self._name, None, buffer, count, kind, peer), stream)

    def check_async_error(self):
        self._library.shared.checked.append((self._library.rank, self._name))

    def abort(self):
        self._library.shared.aborted.append((self._library.rank, self._name))
