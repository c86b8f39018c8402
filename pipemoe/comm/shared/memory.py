"""Memory that all ranks of a host map, and that has no name: the kernel frees it when the last of them has ended.

Each rank makes a file in memory (memfd) and maps it. The others open it through /proc/PID/fd while the rank keeps it
open, check that it is the one that was meant, and map it too. /dev/shm has no part in this.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

PAGE = mmap.PAGESIZE
_LINE = 64
Exchange = Callable[[str], list[str]]  # every rank's text, in rank order


def refusal() -> str | None:
    """Why this system cannot share memory in this way, or None."""
    from pipemoe.comm.shared.words import has_futexes

    if not has_futexes():
        return "this system has no futexes that pipemoe knows"
    if not hasattr(os, "memfd_create"):
        return "this system has no memfd_create"
    try:
        own = OwnMemory(PAGE)
        own.mapped_from(own.ticket)
        own.close()
    except OSError as error:
        return f"memory cannot be shared through memfd and /proc/PID/fd: {error}"
    return None


class OwnMemory:
    """This rank's file: `num_bytes` of zeros, all of it in memory. Raises OSError."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(PAGE, -(-num_bytes // PAGE) * PAGE)
        self._file = os.memfd_create("pipemoe", os.MFD_CLOEXEC)
        try:
            # Takes the pages now: otherwise a lack of memory would end the process at its first write.
            os.posix_fallocate(self._file, 0, self.num_bytes)
        except OSError:
            self.close()
            raise

    @property
    def ticket(self) -> str:
        """By which peers find it."""
        status = os.fstat(self._file)
        return f"{os.getpid()} {self._file} {status.st_dev} {status.st_ino} {self.num_bytes}"

    def mapped_from(self, ticket: str) -> np.ndarray:
        """The bytes of a ticket's memory [num_bytes] uint8, which stay mapped as long as the array lives."""
        process, number, device, inode, num_bytes = map(int, ticket.split())
        own = process == os.getpid() and number == self._file
        path = f"/proc/{process}/fd/{number}"
        file = self._file if own else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            if (status.st_dev, status.st_ino) != (device, inode):
                raise OSError(f"{path} is another file here: the ranks do not see the same processes")
            return _map(file, num_bytes)
        finally:
            if not own:
                os.close(file)

    def close(self) -> None:
        """Close the file, once all ranks have mapped it."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def shared_by_all(num_bytes: int, exchange: Exchange, ranks_here: Sequence[int]) -> tuple[list[np.ndarray], str | None]:
    """`num_bytes` of each rank of this host, mapped here, in rank order; or why some rank, of whatever host, cannot,
    the same on all. All ranks call.

    exchange: of short texts between all ranks.
    """
    own, error, mapped = None, "", []
    try:
        own = OwnMemory(num_bytes)
    except OSError as e:
        error = f"{num_bytes >> 20} MiB of memory cannot be had: {e}"
    tickets = exchange(own.ticket if own else f"! {error}")
    if not any(ticket.startswith("!") for ticket in tickets):
        assert own is not None
        try:
            mapped = [own.mapped_from(tickets[rank]) for rank in ranks_here]
        except (OSError, ValueError) as e:
            error = f"a peer's memory cannot be mapped: {e}"
        tickets = exchange(f"! {error}" if error else "")
    if own is not None:
        own.close()
    refused = next((f"rank {rank}: {text[2:]}" for rank, text in enumerate(tickets) if text.startswith("!")), None)
    return ([] if refused else mapped), refused


def _map(file: int, num_bytes: int) -> np.ndarray:
    """A file's bytes, all of them in memory. Unlike Python's mmap, this keeps no copy of the file open."""
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    address = _libc().mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    owner = (ctypes.c_uint8 * num_bytes).from_address(address)
    # Not when the process ends: a thread may still be at work then.
    weakref.finalize(owner, _libc().munmap, address, num_bytes).atexit = False
    return np.frombuffer(memoryview(owner), np.uint8)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
    return libc


def lines(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole cache lines."""
    return -(-num_bytes // _LINE) * _LINE


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where pieces of these sizes begin, each at a cache line, and where the last one ends."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + lines(size))
    return found
