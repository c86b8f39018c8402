"""What the ranks of a host share if memory can be shared: bells, memory for each runtime's waves, and mail if they
are all ranks that there are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipemoe.comm.exchange import check_equal, encode_error, raise_first, shared
from pipemoe.comm.shared import memory
from pipemoe.comm.shared.bells import Bells
from pipemoe.comm.shared.mail import Mail, SharedGathering
from pipemoe.comm.shared.waves import SharedWaves, WaveMemory
from pipemoe.errors import ConfigError
from pipemoe.runtime.host_lanes import HostLanes
from pipemoe.runtime.last_words import say

if TYPE_CHECKING:
    import numpy as np

    from pipemoe.world.meet import Met

VARIABLE = "PIPEMOE_HOST_TRANSPORT"
TRANSPORTS = ("auto", "shared", "mpi")
# A thread that finds nothing to do looks so long before it sleeps, if there is a core for each rank. Falling asleep and
# waking up takes about a tenth of that.
_SPIN_SECONDS = 50e-6


def wanted_transport() -> str:
    """One of TRANSPORTS, from the environment. Raises ConfigError."""
    name = os.environ.get(VARIABLE, "auto")
    if name not in TRANSPORTS:
        raise ConfigError(f"{VARIABLE} is {name!r}; it must be one of {', '.join(TRANSPORTS)}, or not set")
    return name


def share_memory(met: Met, num_slots: int, exchange: Callable[[bytes, str], list[bytes]]) -> SharedHost | None:
    """Let the ranks of each host share memory, if some host has several, the system allows it, and the user too; or
    None, on all ranks. Where the system does not allow it, rank 0 says so. Every rank calls.

    exchange: of a payload, for a purpose. Raises ConfigError, on all ranks, if some rank's setting makes no sense, or
    asks for this transport alone.
    """
    error, wanted, refused = None, "", None
    try:
        wanted = wanted_transport()
        refused = None if wanted == "mpi" else memory.refusal()
    except ConfigError as e:
        error = e
    raise_first(exchange(encode_error(error), "looking at the transport of the host"))
    told = [json.loads(p) for p in exchange(json.dumps([wanted, refused]).encode(), "choosing the transport")]
    check_equal([{VARIABLE: name} for name, _ in told])
    if wanted == "mpi":
        return None
    refused = next((f"rank {rank}: {why}" for rank, (_, why) in enumerate(told) if why), None)
    if met.num_hosts == met.size:
        refused = "no host has two ranks"
    try:
        if refused:
            raise ConfigError(refused)
        return SharedHost(met, num_slots, exchange, is_wanted=wanted == "shared")
    except ConfigError as e:  # the same on all ranks
        if wanted == "shared":
            raise shared(ConfigError(f"{VARIABLE} is 'shared', but {e}")) from None
        if met.rank == 0:
            say(f"pipemoe: no shared memory between the ranks, so MPI moves their rows: {e}")
        return None


class SharedHost:
    """One rank's side of what the ranks of its host share. Raises ConfigError, on all ranks, if some cannot share
    memory.
    """

    def __init__(
        self, met: Met, num_slots: int, exchange: Callable[[bytes, str], list[bytes]], is_wanted: bool
    ) -> None:
        """is_wanted: the user wants no other transport."""
        self.rank, self.size, self.is_wanted, self._exchange = met.rank, met.size, is_wanted, exchange
        self.ranks_here = met.ranks_here
        self._own = self.ranks_here.index(met.rank)
        self.has_all = len(self.ranks_here) == met.size
        start_of_bell = memory.lines((1 + num_slots) * Mail.num_bytes())
        self._memories, refused = self._shared(start_of_bell + Bells.num_bytes(num_slots))
        if refused:
            raise ConfigError(refused)
        # Where the conductor's thread polls MPI, it wants a core too.
        spins = len(os.sched_getaffinity(0)) >= len(self.ranks_here) * (1 if self.has_all else 2)
        bells = [m.ctypes.data + start_of_bell for m in self._memories]
        self.bells = Bells(self._own, bells, num_slots, _SPIN_SECONDS if spins else 0.0)
        self.lanes = HostLanes(num_slots, self.bells)
        self.lanes.wake.polls_always = not self.has_all  # exchanges go by MPI
        # One for exchanges between all work, and one for the rounds of each slot.
        self._mails = [self._new_mail(number) for number in range(1 + num_slots)]

    def _new_mail(self, number: int) -> Mail:
        start = number * Mail.num_bytes()
        parts = [m[start : start + Mail.num_bytes()] for m in self._memories]
        return Mail(self._own, parts, self._ring_conductors, self.lanes.wake.wants)

    def _shared(self, num_bytes: int) -> tuple[list[np.ndarray], str | None]:
        def exchange(text: str) -> list[str]:
            return [p.decode() for p in self._exchange(text.encode(), "sharing memory")]

        return memory.shared_by_all(num_bytes, exchange, self.ranks_here)

    def _ring_conductors(self) -> None:
        self.bells.ring(self.bells.conductor_channel, range(len(self.ranks_here)))

    def start_gathering(self, payload: bytes, doing: str, slot: int | None = None) -> SharedGathering:
        """Of all ranks, if they are all here. slot: whose round it is for; None: see World.start_gathering."""
        return self._mails[0 if slot is None else 1 + slot].start(payload, doing)

    def num_ahead(self, slot: int) -> int:
        """More than 0 if a peer has posted to a round of the slot to which this rank has not."""
        return self._mails[1 + slot].num_ahead()

    def new_waves(self, layout: WaveMemory) -> tuple[SharedWaves | None, str | None]:
        """Memory for a runtime's waves, or why some rank cannot have it, the same on all. Every rank calls, with the
        same sizes.
        """
        memories, refused = self._shared(layout.num_bytes)
        if refused:
            return None, refused
        by_rank = dict(zip(self.ranks_here, memories, strict=True))
        return SharedWaves(self.rank, self.size, layout, by_rank, self.bells), None
