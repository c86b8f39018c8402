"""MPI, started under a clock.

mpi4py would start it on import, in a call that blocks all of Python until every rank is there.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import Any

from pipemoe.errors import ConfigError, WatchdogTimeout
from pipemoe.runtime.last_words import exit_now, note, say
from pipemoe.world.departure import departure
from pipemoe.world.launcher import HOW_TO_START, Launch, check_size, rank_text, ranks_on_this_host
from pipemoe.world.meeting import Patience
from pipemoe.world.shared_memory import check_shared_memory, segments_mapped_here

# MPICH's schedules need a poll per round, and a rank that computes polls late. Trees need fewer rounds.
_MPICH_TREES = ("MPIR_CVAR_IREDUCE_INTRA_ALGORITHM", "MPIR_CVAR_IBCAST_INTRA_ALGORITHM")
_LOOK_SECONDS = 0.1


def start_mpi(launch: Launch, setup_seconds: float) -> Any:
    """Start MPI, and return mpi4py's module.

    Raises ConfigError if it cannot start, or is not the launcher's MPI. Ends the process with status 70 if some rank
    does not start it within `setup_seconds`.
    """
    for name in _MPICH_TREES:  # read when MPI starts
        os.environ.setdefault(name, "tsp_tree")
    mpi = _imported(launch)
    if mpi.Is_finalized():
        raise ConfigError("MPI has been finalised in this process, and starts only once; call pipemoe.init() before")
    if not mpi.Is_initialized():
        if "MPICH" in mpi.Get_library_version():
            check_shared_memory(ranks_on_this_host(os.environ, launch.num_ranks or 1))
        _initialise(mpi, launch, setup_seconds)
        departure.will_end_mpi()
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise ConfigError(
            "MPI was started without thread support; let mpi4py initialise it, with its default thread level"
        )
    check_size(launch, mpi.COMM_WORLD.Get_size(), os.environ)
    note(f"segments.{os.getpid()}", "".join(f"{path}\n" for path in segments_mapped_here()))
    departure.uses(mpi)
    return mpi


def _imported(launch: Launch) -> Any:
    try:
        import mpi4py

        usual = mpi4py.rc.initialize
        mpi4py.rc.initialize = False
        try:
            from mpi4py import MPI
        finally:
            mpi4py.rc.initialize = usual
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        said = f"({' '.join(str(error).split())})"
        text = (
            f"a launcher started several ranks ({launch.said_by}), "
            f"but mpi4py cannot be imported {said}; install pipemoe[mpi]"
        )
        raise ConfigError(text) from None
    return MPI


def _initialise(mpi: Any, launch: Launch, setup_seconds: float) -> None:
    patience, done = Patience(rank_text(os.environ), setup_seconds), threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            try:
                patience.look(f"all {launch.num_ranks or ''} ranks to start MPI".replace("  ", " "))
            except WatchdogTimeout as error:
                say(f"pipemoe: WatchdogTimeout: {error}")
                exit_now()

    threading.Thread(target=watch, name="pipemoe start of MPI", daemon=True).start()
    try:
        # Called through ctypes, so that Python's other threads run and watch. mpi4py's call would block them.
        library, provided = ctypes.CDLL(mpi.__file__), ctypes.c_int()
        if not hasattr(library, "MPI_Init_thread"):
            mpi.Init_thread()
        elif library.MPI_Init_thread(None, None, ctypes.c_int(mpi.THREAD_MULTIPLE), ctypes.byref(provided)):
            raise ConfigError(f"MPI does not start; {HOW_TO_START}")
    finally:
        done.set()
    for comm in (mpi.COMM_WORLD, mpi.COMM_SELF):  # as mpi4py does when it starts MPI: errors are raised
        comm.Set_errhandler(mpi.ERRORS_RETURN)
