"""What the ranks of a host share if memory can be shared: bells, mail, and memory for each runtime's waves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipemoe.comm.shared import memory
from pipemoe.comm.shared.bells import Bells
from pipemoe.comm.shared.mail import Mail, SharedGathering
from pipemoe.comm.shared.waves import SharedWaves, WaveMemory
from pipemoe.errors import ConfigError
from pipemoe.runtime.host_lanes import HostLanes

if TYPE_CHECKING:
    import numpy as np

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


class SharedHost:
    """One rank's side of what all ranks share. Raises ConfigError, on all ranks, if some cannot share memory."""

    def __init__(self, rank: int, size: int, num_slots: int, exchange: memory.Exchange) -> None:
        self.rank, self.size, self.num_slots = rank, size, num_slots
        start_of_bell = memory.lines((1 + num_slots) * Mail.num_bytes())
        self._memories, refused = memory.shared_by_all(start_of_bell + Bells.num_bytes(num_slots), exchange)
        if refused:
            raise ConfigError(refused)
        spins = len(os.sched_getaffinity(0)) >= size
        bells = [m.ctypes.data + start_of_bell for m in self._memories]
        self.bells = Bells(rank, bells, num_slots, _SPIN_SECONDS if spins else 0.0)
        self.lanes = HostLanes(num_slots, self.bells)
        # One for exchanges between all work, and one for the rounds of each slot.
        self._mails = [self._new_mail(number) for number in range(1 + num_slots)]

    def _new_mail(self, number: int) -> Mail:
        start = number * Mail.num_bytes()
        parts = [m[start : start + Mail.num_bytes()] for m in self._memories]
        return Mail(self.rank, parts, self._ring_conductors, self.lanes.wake.wants)

    def _ring_conductors(self) -> None:
        self.bells.ring(self.bells.conductor_channel, range(self.size))

    def start_gathering(self, payload: bytes, doing: str, slot: int | None = None) -> SharedGathering:
        """slot: whose round it is for; None: see World.start_gathering."""
        return self._mails[0 if slot is None else 1 + slot].start(payload, doing)

    def num_ahead(self, slot: int) -> int:
        """More than 0 if a peer has posted to a round of the slot to which this rank has not."""
        return self._mails[1 + slot].num_ahead()

    def waves(self, layout: WaveMemory, memories: Sequence[np.ndarray]) -> SharedWaves:
        return SharedWaves(self.rank, layout, memories, self.bells)
