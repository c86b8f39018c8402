"""How the ranks meet at the start of a world: MPI starts, and each rank learns where the others are."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from pipemoe.comm.mpi import Communicators
from pipemoe.errors import WatchdogTimeout
from pipemoe.world.arguments import InitArguments
from pipemoe.world.departure import departure
from pipemoe.world.launcher import Launch
from pipemoe.world.meeting import Meeting, Patience, ranks_text, wait_for
from pipemoe.world.mpi_start import start_mpi

_communicators: Communicators | None = None  # of this process


@dataclass(frozen=True, slots=True)
class Met:
    """What a rank knows once all ranks have met."""

    communicators: Communicators
    rank: int
    size: int
    hosts: tuple[int, ...]  # of every rank, numbered by their first ranks

    @property
    def local_rank(self) -> int:
        """Among the ranks of its host."""
        return self.ranks_here.index(self.rank)

    @property
    def num_hosts(self) -> int:
        return max(self.hosts) + 1

    @property
    def ranks_here(self) -> list[int]:
        """The ranks of this rank's host."""
        return [rank for rank, host in enumerate(self.hosts) if host == self.hosts[self.rank]]


def meet(launch: Launch, arguments: InitArguments) -> Met | None:
    """Start MPI if need be, and wait for every rank. None if there turns out to be one rank only.

    Raises WatchdogTimeout if a rank does not come within setup_seconds; then the process ends.
    """
    global _communicators
    mpi = start_mpi(launch, arguments.setup_seconds)
    comm = mpi.COMM_WORLD if _communicators is None else _communicators.world
    rank, size = comm.Get_rank(), comm.Get_size()
    if size == 1:
        return None
    patience = Patience(f"rank {rank}", arguments.setup_seconds)
    try:
        places = _everyones(Meeting(comm, json.dumps([_host(), os.getpid()]).encode()), patience)
        if _communicators is None:
            duplicate, request = mpi.COMM_WORLD.Idup()
            wait_for(lambda: "" if request.Test() else "MPI to make the first communicator", patience)
            _communicators = Communicators(duplicate)
    except WatchdogTimeout as late:
        departure.is_lost(late, arguments.grace_seconds)
        raise
    departure.met(rank, places, arguments.watchdog_seconds)
    names = [host for host, _ in places]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return Met(_communicators, rank, size, tuple(numbers[name] for name in names))


def _everyones(meeting: Meeting, patience: Patience) -> list[tuple[str, int]]:
    def missing() -> str:
        ranks = meeting.missing()
        return f"{ranks_text(ranks)} to call pipemoe.init()" if ranks else ""

    wait_for(missing, patience)
    return [tuple(json.loads(meeting.payloads[r])) for r in sorted(meeting.payloads)]


def _host() -> str:
    """A name for this host. Two hosts may share a host name, so the kernel's boot id is part of it; containers of one
    host have their own GPUs and network, so the host name is too.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"
