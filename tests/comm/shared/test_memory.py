"""Memory of ranks that are processes: mapped by all, named by nobody, gone with the last of them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipemoe.comm.shared import memory
from pipemoe.comm.shared.memory import PAGE, OwnMemory, offsets, refusal, shared_by_all
from tests.comm.shared.shared_ranks import Meeting, on_ranks

# Maps what the ticket names, adds one to its first bytes, and stays until it is killed.
PEER = """
import signal, sys
from pipemoe.comm.shared.memory import OwnMemory
own = OwnMemory(1)
mapped = own.mapped_from(sys.argv[1])
mapped[:8] += 1
print(own.ticket, flush=True)
signal.pause()
"""


def processes_that_map(ticket: str) -> set[int]:
    """Of the whole machine, where other jobs may come and go."""
    inode, found = ticket.split()[3], set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = [line.split() for line in maps.read_text().splitlines() if "memfd:pipemoe" in line]
        except OSError:
            continue
        if any(fields[4] == inode for fields in lines):
            found.add(int(maps.parent.name))
    return found


def ours_in_dev_shm() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if "pipemoe" in name]


def test_this_system_shares_memory():
    assert refusal() is None


def test_another_process_sees_it_and_it_is_gone_after_a_kill():
    own = OwnMemory(3 * PAGE - 1)
    own_ticket = own.ticket
    mapped = own.mapped_from(own_ticket)
    assert len(mapped) == 3 * PAGE and not mapped.any()
    mapped[:] = 41
    with subprocess.Popen([sys.executable, "-c", PEER, own_ticket], stdout=subprocess.PIPE, text=True) as peer:
        try:
            ticket = peer.stdout.readline()
            assert (mapped[:8] == 42).all() and (mapped[8:] == 41).all()
            theirs = own.mapped_from(ticket)
            assert processes_that_map(own_ticket) == {os.getpid(), peer.pid} and processes_that_map(ticket)
            assert not ours_in_dev_shm()
        finally:
            peer.kill()
    theirs[:] = 1  # its memory stays as long as somebody has it
    assert processes_that_map(own_ticket) == processes_that_map(ticket) == {os.getpid()}
    own.close()
    del mapped, theirs
    assert not processes_that_map(own_ticket) | processes_that_map(ticket)
    with pytest.raises(OSError):
        OwnMemory(1).mapped_from(ticket)


def test_a_ticket_for_another_file_is_refused():
    one, other = OwnMemory(1), OwnMemory(1)
    fields = one.ticket.split()
    fields[1] = other.ticket.split()[1]
    with pytest.raises(OSError, match="is another file here"):
        one.mapped_from(" ".join(fields))
    one.close()
    other.close()


def shared(num_ranks, num_bytes=100):
    meeting = Meeting(num_ranks)
    return on_ranks(num_ranks, lambda rank: shared_by_all(num_bytes, meeting.exchange_of(rank), range(num_ranks)))


def test_all_ranks_map_all():
    files = len(os.listdir("/proc/self/fd"))
    found = shared(3)
    for rank, (mapped, refused) in enumerate(found):
        assert refused is None and len(mapped) == 3
        mapped[rank][:4] = rank + 1
    for mapped, _ in found:
        assert [int(m[0]) for m in mapped] == [1, 2, 3] and mapped[0].dtype == np.uint8
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("step", ["taking", "mapping"])
def test_what_one_rank_cannot_none_does(step, monkeypatch):
    files, calls = len(os.listdir("/proc/self/fd")), []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(12, "Cannot allocate memory")
        return original(*arguments)

    if step == "taking":
        original = os.posix_fallocate
        monkeypatch.setattr(memory.os, "posix_fallocate", once)
    else:
        original = memory._map
        monkeypatch.setattr(memory, "_map", once)
    found = shared(2)
    assert [mapped for mapped, _ in found] == [[], []]
    assert found[0][1] == found[1][1] and "Cannot allocate memory" in found[0][1] and found[0][1].startswith("rank ")
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_system_without_such_memory_says_so(monkeypatch):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(memory.os, "memfd_create", refuse)
    assert "memory cannot be shared" in refusal() and "not implemented" in refusal()


def test_pieces_begin_at_cache_lines():
    assert offsets([1, 64, 65, 0]) == [0, 64, 128, 256, 256]
