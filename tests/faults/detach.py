"""For ranks that die: out of the launcher's reach."""

from __future__ import annotations

import os


def detach() -> None:
    """Go on in a process and session of its own, of which the launcher knows only the parent: when a rank dies,
    launchers end the others, also those told not to (MPICH 5.0's `-disable-auto-cleanup` does so now and then)."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(1 if status else 0)
    os.setsid()
