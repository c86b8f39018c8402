"""What joins a rank to the others: small exchanges, the side channel, and the transport of rows with its lanes."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipemoe.comm.exchange import check_equal, encode_error, raise_first
from pipemoe.comm.gathering import Gathering, LocalGathering, MpiGathering
from pipemoe.comm.side_channel import SideChannel
from pipemoe.comm.transport import LocalTransport, Transport
from pipemoe.errors import ConfigError, PipemoeError
from pipemoe.plan.room import Room
from pipemoe.runtime.conductor import Conductor
from pipemoe.runtime.lanes import Lanes, host_lanes
from pipemoe.world.departure import departure
from pipemoe.world.gpu import lanes_of
from pipemoe.world.meet import Met
from pipemoe.world.warm_up import WarmUp

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.mpi import HostLinks
    from pipemoe.world.shared_host import SharedHost


class Connection:
    """Made and closed by a world. Where there are several ranks, all methods run on the conductor's thread."""

    def __init__(
        self,
        met: Met | None,
        num_slots: int,
        setup_seconds: float,
        device: torch.device,
        conductor: Conductor,
    ) -> None:
        """met: None for a world of one rank."""
        self._met, self._num_slots, self._setup_seconds = met, num_slots, setup_seconds
        self._device, self._on_gpu, self._conductor = device, device.type == "cuda", conductor
        self._rank, self._size = (met.rank, met.size) if met else (0, 1)
        self.block_room: Room | None = None  # of the collectives on this rank's GPU, if there are any
        self.transport: Transport = LocalTransport()
        self.lanes: Any  # Lanes, or HostLanes
        self.shared: SharedHost | None = None  # ranks of this host that share memory

    def meet(self, error: PipemoeError | None) -> None:
        """Hear whether every rank can go on. The side channel comes first, to watch the rest. error: why this rank
        cannot.
        """
        self._open_side_channel()
        self.raise_on_all(error, "looking at the arguments of init")
        settings = {"num_slots": str(self._num_slots), "device": self._device.type}
        check_equal(
            [json.loads(p) for p in self.exchange(json.dumps(settings).encode(), "comparing the arguments of init")]
        )

    def connect(self) -> None:
        """Make the transport of rows, and its lanes."""
        if self._met is None:
            self.lanes = self._own_lanes()
            return
        if not self._on_gpu and self._shares_memory():
            return
        self.lanes = self._own_lanes()
        self.transport = self._nccl_transport() if self._on_gpu else self.mpi_transport()
        self._conductor.watch_transport(self.transport)
        self._warm_up()

    def close(self) -> None:
        self.transport.close()
        if hasattr(self, "lanes"):
            self.lanes.close()

    @property
    def shared_by_all(self) -> SharedHost | None:
        """What all ranks share, if they all share memory."""
        return self.shared if self.shared is not None and self.shared.has_all else None

    @property
    def hosts(self) -> tuple[int, ...]:
        """The number of every rank's host."""
        return self._met.hosts if self._met else (0,)

    def start_gathering(self, payload: bytes, doing: str, slot: int | None = None) -> Gathering:
        """See World.start_gathering."""
        if self._met is None:
            return LocalGathering(payload)
        if self.shared_by_all is not None:
            return self.shared_by_all.start_gathering(payload, doing, slot)
        known = self._met.communicators
        comm = known.world if slot is None else known.for_rounds(self._num_slots)[slot]
        return MpiGathering(comm, payload, doing)

    def prepare_rounds(self) -> None:
        """Let `start_gathering` take a slot. Every rank calls."""
        if self._met is not None and self.shared_by_all is None:
            self._conductor.note("making MPI communicators", self._setup_seconds)
            self._met.communicators.for_rounds(self._num_slots)

    def exchange(self, payload: bytes, doing: str) -> list[bytes]:
        """Every rank's payload, by a small all-gather. It waits up to setup_seconds."""
        gathering = self.start_gathering(payload, doing)
        self._conductor.wait(gathering.done, doing, seconds=self._setup_seconds, needs_all=True)
        return gathering.payloads

    def raise_on_all(self, error: PipemoeError | None, doing: str) -> None:
        """Raise the first rank's error on all ranks, if there is one. Every rank calls."""
        raise_first(self.exchange(encode_error(error), doing))

    def _open_side_channel(self) -> None:
        from mpi4py import MPI

        assert self._met is not None
        conductor = self._conductor
        error: ConfigError | None = None
        conductor.blame_peers_for(MPI.Exception)
        try:
            one_host, news = self._met.num_hosts == 1, lambda: conductor.wake.set()
            channel = SideChannel(self._rank, self._size, one_host, conductor.progress, conductor.watch, news)
        except (OSError, ConfigError) as e:
            error = e if isinstance(e, ConfigError) else ConfigError(f"no socket to hear the other ranks at: {e}")
        self.raise_on_all(error, "opening the side channel")
        host, port = channel.address()
        met = [
            p.decode().split()
            for p in self.exchange(f"{host} {port} {secrets.token_hex(16)}".encode(), "exchange of addresses")
        ]
        channel.connect([(h, int(p)) for h, p, _ in met], met[0][2], self._setup_seconds)
        conductor.hear_peers_by(channel)
        departure.keep(channel)

    def _own_lanes(self) -> Lanes:
        if self._on_gpu:
            return lanes_of(self._device, self._num_slots, alone=self._size == 1)
        return host_lanes(self._num_slots, self._conductor.wake.set)

    def _shares_memory(self) -> bool:
        from pipemoe.world.shared_host import share_memory

        assert self._met is not None
        self.shared = share_memory(self._met, self._num_slots, self.exchange)
        if self.shared is None:
            return False
        self.lanes = self.shared.lanes
        self._conductor.listen_by(self.lanes.wake)
        return True

    def host_links(self) -> HostLinks:
        """To ranks of other hosts, from ranks that share memory with those of their own."""
        from pipemoe.comm.mpi import HostLinks

        assert self._met is not None
        others = [rank for rank in range(self._size) if rank not in self._met.ranks_here]
        return HostLinks(self._met.communicators, self._num_slots, others)

    def mpi_transport(self) -> Transport:
        """For all rows, or for those of a runtime that finds no shared memory."""
        from pipemoe.comm.mpi import MpiTransport

        self._conductor.note("making MPI communicators", self._setup_seconds)
        assert self._met is not None
        return MpiTransport(self._met.communicators, self._num_slots)

    def _nccl_transport(self) -> Transport:
        from pipemoe.comm import nccl

        ids: list[bytes] = []
        error: PipemoeError | None = None
        try:
            self._check_nccl_settings()
        except ConfigError as e:
            error = e
        self.raise_on_all(error, "looking at NCCL's settings")
        room = self._room()
        self.block_room = room
        try:
            room.check(self._num_slots)
            library = nccl.library()
            self._conductor.blame_peers_for(library.NcclError, nccl.NcclFailed)
            if self._rank == 0:
                ids = nccl.unique_ids(2 * self._num_slots)
        except PipemoeError as e:
            error = e
        self.raise_on_all(error, "checking room for thread blocks")
        texts = self.exchange(json.dumps([i.hex() for i in ids]).encode(), "exchange of NCCL ids")
        self._conductor.note("making NCCL communicators", self._setup_seconds)
        return nccl.NcclTransport(self._rank, self._size, [bytes.fromhex(i) for i in json.loads(texts[0])])

    def _check_nccl_settings(self) -> None:
        for name, least in (("NCCL_MAX_CTAS", 1), ("NCCL_CGA_CLUSTER_SIZE", 0)):
            text = os.environ.get(name, str(least))
            if not (text.isascii() and text.isdigit() and int(text) >= least):
                raise ConfigError(
                    f"rank {self._rank}: {name} is {text!r}; it must be a whole number of at least {least}, or not set"
                )

    def _room(self) -> Room:
        """The SMs that this rank may use, and the thread blocks of all communicators on its GPU."""
        import torch

        from pipemoe.comm import nccl

        properties = torch.cuda.get_device_properties(self._device)
        num_sms = properties.multi_processor_count  # of the share, under MPS
        place = f"{socket.gethostname()} {properties.uuid}"
        gpus = [json.loads(p) for p in self.exchange(json.dumps([place, num_sms]).encode(), "exchange of GPU names")]
        sharing = Counter(place for place, _ in gpus)
        # NCCL reads the variable when a communicator is made. The same default on all ranks, whatever their GPUs.
        default = nccl.default_max_ctas(min(num_sms for _, num_sms in gpus), self._num_slots, max(sharing.values()))
        os.environ.setdefault("NCCL_MAX_CTAS", str(default))
        # Clusters of blocks would have to find neighbouring SMs that are free; kernels that leave some leave any.
        os.environ.setdefault("NCCL_CGA_CLUSTER_SIZE", "0")
        return Room(num_sms, nccl.max_ctas(), ranks_on_device=sharing[place])

    def _warm_up(self) -> None:
        import torch

        warm_up, error = None, None
        try:
            warm_up = WarmUp(self._rank, self._size, self._device)
        except (
            MemoryError,
            RuntimeError,
            torch.OutOfMemoryError,
        ) as e:  # for the host's memory torch raises a RuntimeError
            said = " ".join(str(e).split())[:300]
            error = ConfigError(
                f"rank {self._rank}: out of memory at set-up ({said}); give each rank more, or start fewer"
            )
        self.raise_on_all(error, "making room for the first use of the communicators")
        assert warm_up is not None  # or the error has been raised
        done = warm_up.start(self.transport, self.lanes)
        self._conductor.wait(done, "first use of the communicators", seconds=self._setup_seconds, needs_all=True)
