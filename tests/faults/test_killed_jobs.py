"""All ranks of a job are killed at once: what they shared is gone, and nothing of it was ever in /dev/shm."""

import contextlib
import os
import signal
import time
from pathlib import Path

from tests.faults.job import POLL_SECONDS, START_SECONDS, FaultJob

NUM_RANKS = 2


def shared_by(process: int) -> dict[str, int]:
    """The memory that a process shares: bytes by inode."""
    maps = Path(f"/proc/{process}/maps").read_text()
    found = [line.split() for line in maps.splitlines() if "memfd:pipemoe" in line]
    spans = {fields[4]: fields[0].split("-") for fields in found}
    return {inode: int(end, 16) - int(begin, 16) for inode, (begin, end) in spans.items()}


def everything_shared() -> set[str]:
    """The inodes that any process of this machine shares."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                found |= shared_by(int(process.name)).keys()
    return found


def test_memory_is_freed_and_nothing_was_in_dev_shm(tmp_path):
    listed = set(os.listdir("/dev/shm"))
    job = FaultJob("wait", NUM_RANKS, tmp_path, program="waiting_ranks")
    found, deadline = [tmp_path / f"pid{rank}" for rank in range(NUM_RANKS)], time.monotonic() + START_SECONDS
    while not all(path.exists() for path in found):
        assert job.process.poll() is None and time.monotonic() < deadline, job.told()
        time.sleep(POLL_SECONDS)
    processes = [int(path.read_text()) for path in found]
    assert {*processes} <= {int(text.split()[0]) for text in job.processes()}  # or none would ever be left behind
    shared = [shared_by(process) for process in processes]
    assert all(shared[0] == of_rank for of_rank in shared) and len(shared[0]) == 2 * NUM_RANKS  # bells and waves
    new = set(os.listdir("/dev/shm")) - listed
    assert not [name for name in new if "pipemoe" in name]
    assert shared[0].keys() <= everything_shared()
    for process in processes:
        os.kill(process, signal.SIGKILL)
    out, err = job.wait()
    assert job.process.returncode != 0, out + err
    assert not job.left_behind()
    assert sum(shared[0].values()) > 100 << 20
    assert not shared[0].keys() & everything_shared()  # so the kernel has freed it
