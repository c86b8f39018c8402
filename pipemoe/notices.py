"""What the library tells its user unasked: each thing once per process, from one rank of a host, through the logger
"pipemoe".

As warnings, because those reach standard error where nobody has set up logging.
"""

from __future__ import annotations

import logging
import os

_LOGGER = logging.getLogger("pipemoe")
# By which launchers tell a process its place on its host: MPICH and Intel MPI, Open MPI, Slurm.
_PLACE_VARIABLES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
_told: set[str] = set()


def tell(text: str, *, once: str | None = None) -> bool:
    """Log `text`, unless something was told under the same `once` (default: the text itself), or another rank of this
    host speaks. Returns whether it was logged."""
    key = once or text
    place = next((os.environ[name] for name in _PLACE_VARIABLES if name in os.environ), "0")
    if key in _told or place != "0":
        return False
    _told.add(key)
    _LOGGER.warning("pipemoe: %s", text)
    return True
