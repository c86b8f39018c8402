"""From a rank's good-bye to the end of its process.

MPI's finalisation waits for every rank, silently and without end. So the side channel outlives the world: at the end
of its process each rank first waits until the others are there too. That may take long, since others may have other
work to do. A rank that has stopped, or has ended without finalisation, ends the wait. Only then comes the finalisation,
limited by the watchdog.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipemoe.errors import ConfigError, FatalError
from pipemoe.runtime.last_words import exit_after, exit_now, say
from pipemoe.world.meeting import ranks_text

if TYPE_CHECKING:
    from pipemoe.comm.side_channel import Peer, SideChannel
    from pipemoe.runtime.conductor import Conductor

_POLL_SECONDS = 0.005
_SHARED_END_SECONDS = 5.0  # for ranks that end by the same error to arrive, so that none aborts the others


class Departure:
    """The departure of this process, whatever worlds it has had."""

    def __init__(self) -> None:
        self._ends_mpi = self._fails_alike = False
        self.forked_from: int | None = None  # the process in which MPI was started, once this is a child of it
        self.channel: SideChannel | None = None  # to all ranks, until the process ends
        self._mpi: Any = None
        self._places: list[tuple[str, int]] = []  # by rank: host, process
        self._rank, self._watchdog_seconds = 0, 600.0
        self._leaving: Conductor | None = None
        self._left_channel: SideChannel | None = None
        self._abort_status = 0
        self._is_lost = False

    def uses(self, mpi: Any) -> None:
        """MPI runs. From now on, watch the end of the process."""
        if self._mpi is not None:
            return
        self._mpi = mpi
        atexit.register(self._at_exit)  # so it comes after what a world registers later
        # what `python -m mpi4py` calls for a rank that ends by an error
        set_status = getattr(mpi, "_set_abort_status", None)
        if set_status is not None:

            def heard(status: int) -> None:
                if self.forked_from is None:  # a child that fails is its parent's affair, and must not end all ranks
                    self._abort_status = status
                    set_status(status)

            mpi._set_abort_status = heard

    def will_end_mpi(self) -> None:
        """MPI was started here, so that nobody else will end it."""
        self._ends_mpi = True

    def will_fail_alike(self) -> None:
        """This rank ends by an error that all ranks have."""
        self._fails_alike = True

    def met(self, rank: int, places: list[tuple[str, int]], watchdog_seconds: float) -> None:
        """Remember who the ranks are. places: host and process of each."""
        self._rank, self._places, self._watchdog_seconds = rank, places, watchdog_seconds

    def keep(self, channel: SideChannel) -> None:
        """Keep the new world's channel, and close that of the world that has left."""
        self.channel = channel
        if self._left_channel is not None:
            self._left_channel.close()
            self._left_channel = None

    def leaves(self, conductor: Conductor) -> None:
        """A world leaves; its conductor says good-bye in its own time."""
        self._leaving, self._left_channel = conductor, conductor.side_channel

    def is_lost(self, error: FatalError, grace_seconds: float) -> None:
        """The ranks have not even met, so MPI would wait for them: end the process."""
        self._is_lost = True
        say(f"pipemoe: {type(error).__name__}: {error}")
        exit_after(grace_seconds)

    def join(self) -> None:
        """Wait for the last world's good-bye: two conductors must not use MPI at once."""
        conductor, self._leaving = self._leaving, None
        if conductor is not None:
            conductor.join()

    def check_process(self) -> None:
        """Raises ConfigError in a process forked from one that runs MPI."""
        if self.forked_from is not None:
            raise ConfigError(
                f"this process was forked from process {self.forked_from} after that had started MPI, which does "
                "not work in a child;"
                " start it with subprocess, or multiprocessing's 'spawn'"
            )

    def disown(self, parent: int) -> None:
        """In a forked process: MPI, its end and the sockets belong to the parent."""
        atexit.unregister(self._at_exit)
        if self.channel is not None:
            self.channel.disown()
        if self._mpi is not None:
            self.forked_from = parent

    def _at_exit(self) -> None:
        if self._is_lost:
            exit_now()
        self.join()
        if self._mpi.Is_finalized():
            return
        if self.channel is not None:
            self.channel.tell(exiting=True)
            if not self._all_are_there(self.channel):
                return  # mpi4py aborts
        if self._ends_mpi:
            done = threading.Event()
            threading.Thread(
                target=self._watch_finalisation, args=(done,), name="pipemoe end of MPI", daemon=True
            ).start()
            _finalise(self._mpi)
            # where MPI lets a rank go before the others, the launcher would wait for them without a word
            if self.channel is not None:
                self.channel.tell(finalised=True)
                while not all(peer.news.get("finalised") or peer.gone for peer in self.channel.peers.values()):
                    time.sleep(_POLL_SECONDS)
            done.set()

    def _all_are_there(self, channel: SideChannel) -> bool:
        """Wait until all others end too. False if this rank ends by an error, which ends them without a wait."""
        begin = time.monotonic()
        while waiting := [r for r, peer in channel.peers.items() if not peer.news.get("exiting")]:
            if self._abort_status and time.monotonic() - begin > (_SHARED_END_SECONDS if self._fails_alike else 0.0):
                return False
            for rank in waiting:
                self._check(rank, channel.peers[rank])
            time.sleep(_POLL_SECONDS)
        return True

    def _check(self, rank: int, peer: Peer) -> None:
        place = self._places[rank]
        silent = time.monotonic() - peer.heard
        if peer.failure is not None:
            self._give_up(f"rank {rank} has failed ({peer.failure})")
        elif peer.gone:
            self._give_up(f"rank {rank} has ended without MPI's finalisation, which needs every rank")
        elif silent > self._watchdog_seconds and not self._is_busy(place):
            self._give_up(
                f"rank {rank}, which MPI's finalisation needs, was not heard for {silent:.1f} s: it must have stopped"
            )

    def _is_busy(self, place: tuple[str, int]) -> bool:
        """Is a silent rank still running? A long call may keep its other threads from speaking. Only processes of
        this host can be looked at.
        """
        if place[0] != self._places[self._rank][0]:
            return False
        try:
            return Path(f"/proc/{place[1]}/stat").read_text().rpartition(")")[2].split()[0] in ("R", "S", "D")
        except OSError:
            return False

    def _watch_finalisation(self, done: threading.Event) -> None:
        if not done.wait(self._watchdog_seconds):
            others = ranks_text([r for r in range(len(self._places)) if r != self._rank])
            self._give_up(
                f"MPI's finalisation, which waits for {others}, takes more than {self._watchdog_seconds:.1f} s"
            )

    def _give_up(self, why: str) -> None:
        say(f"pipemoe: rank {self._rank}: at the end of the process: {why}")
        exit_now()


def _finalise(mpi: Any) -> None:
    """Finalise MPI through ctypes, so that Python's other threads run and watch. mpi4py's call would block them."""
    library = ctypes.CDLL(mpi.__file__)
    if hasattr(library, "MPI_Finalize"):
        library.MPI_Finalize()
    else:
        mpi.Finalize()


departure = Departure()


def disown_in_children(world_of: Any) -> None:
    """See to it that forked processes have no world. Once per process. world_of: returns the open world, or None."""
    parent = os.getpid()

    def in_child() -> None:
        departure.disown(parent)
        world = world_of()
        if world is not None:
            world.disown(parent)

    os.register_at_fork(after_in_child=in_child)
