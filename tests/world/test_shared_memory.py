"""/dev/shm: too little room is a sentence, before MPI meets it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from pipemoe.errors import ConfigError
from pipemoe.world import shared_memory
from pipemoe.world.shared_memory import BYTES_OF_RANK, check_shared_memory

# As root in a container of its own kind: /dev/shm of one MiB, and a rank that a launcher of two started.
PROGRAM = """
import os
os.environ |= {"PMI_SIZE": "2", "PMI_RANK": "0"}
import pipemoe
try:
    pipemoe.init("cpu")
except pipemoe.PipemoeError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_room_is_counted_without_what_old_jobs_left(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    status = os.statvfs(tmp_path)
    size = status.f_blocks * status.f_frsize
    check_shared_memory(1)
    with pytest.raises(ConfigError, match=rf"{tmp_path} has \d+ MiB, but MPI needs \d+ MiB there for \d+ ranks"):
        check_shared_memory(size // BYTES_OF_RANK + 1)
    left = tmp_path / "left"
    left.write_bytes(bytes(4 << 20))
    check_shared_memory((size - 1) // BYTES_OF_RANK)  # it may be this job's own
    os.utime(left, (time.time() - 3600,) * 2)
    with pytest.raises(ConfigError, match="4 MiB of it are in use"):
        check_shared_memory(max(1, (size - (4 << 20)) // BYTES_OF_RANK + 1))


def test_too_little_is_said_before_mpi_starts():
    pytest.importorskip("mpi4py")
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount here")
    ask = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    if "MPICH" not in subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout:
        pytest.skip("another MPI says so itself")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "ConfigError: /dev/shm has 1 MiB, but MPI needs 10 MiB there for 2 ranks" in result.stdout, result.stderr
