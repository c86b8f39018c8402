"""MPI's files in /dev/shm: whether there is room for them, and which ones failed jobs have left behind."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from pipemoe.errors import ConfigError

FOLDER = Path("/dev/shm")
# As measured with MPICH 5.0 on 2 to 16 ranks: 1.06 MB a rank in one segment, and 4.3 MB of UCX's for each.
BYTES_OF_RANK = 5_500_000
_NAMES = re.compile(r"mpich|ucx_shm|psm2_|Intel_MPI|vader_segment|sm_segment|impi")
_START_SECONDS = 60.0  # within which all ranks of a job start


def check_shared_memory(num_ranks: int) -> None:
    """Raises ConfigError if /dev/shm has no room for `num_ranks` ranks of this host. MPI would end them with a bus
    error.
    """
    try:
        status = os.statvfs(FOLDER)
    except OSError:
        return  # MPI does without, or says so
    size = status.f_blocks * status.f_frsize
    # Quicker ranks of this job may already have their share, which must not count. So only old files count.
    used = min(_old_bytes(time.time() - _START_SECONDS), size)
    needed = num_ranks * BYTES_OF_RANK
    if size - used < needed:
        left = f", and {used >> 20} MiB of it are in use" if used else ""
        raise ConfigError(
            f"{FOLDER} has {size / 2**20:.0f} MiB{left}, but MPI needs {needed / 2**20:.0f} MiB there for "
            f"{num_ranks} ranks;"
            " make it larger (in a container: --shm-size=1g), or remove what old jobs left there (`pipemoe doctor` "
            "names it)"
        )


def segments_mapped_here() -> list[str]:
    """Files of MPI in /dev/shm that this process has mapped."""
    return sorted(path for path in _mapped("self") if _NAMES.search(Path(path).name))


def old_segments() -> list[Path]:
    """This user's files of MPI in /dev/shm that no process visible here has mapped."""
    found = [path for path in _files() if _NAMES.search(path.name) and _is_own(path)]
    if not found:
        return []
    live: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        live |= _mapped(process.name)
    return [path for path in found if str(path) not in live]


def _is_own(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except OSError:  # it has just been removed
        return False


def _old_bytes(before: float) -> int:
    total = 0
    for path in _files():
        try:
            status = path.stat()
        except OSError:
            continue
        total += status.st_blocks * 512 if status.st_mtime < before else 0
    return total


def _files() -> list[Path]:
    try:
        return sorted(path for path in FOLDER.iterdir() if path.is_file())
    except OSError:
        return []


def _mapped(process: str) -> set[str]:
    """Files in /dev/shm that a process has mapped, without removed ones."""
    try:
        lines = Path("/proc", process, "maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {line[line.index("/") :] for line in lines if f"{FOLDER}/" in line and not line.endswith("(deleted)")}
