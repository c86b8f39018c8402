"""What launch/mpirun.sh does when a job ends: its exit status, the signals that it hands on, and what it leaves on the
machine.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from pipemoe.world import shared_memory
from tests.launch.test_mpirun import MPIRUN, SIGNALS, clean_environment, heed_signals

# A stand-in for mpirun: no ranks, but the notes that they leave.
STAND_IN = """#!/usr/bin/env bash
[ "$1" != --version ] || { echo HYDRA; exit; }
"""


@pytest.fixture
def start(tmp_path):
    """start(what the stand-in does) -> the running launcher."""
    running = []

    def start(text: str, **settings: str) -> subprocess.Popen:
        mpirun = tmp_path / "mpirun"
        mpirun.write_text(STAND_IN + text)
        mpirun.chmod(0o755)
        (tmp_path / "tmp").mkdir(exist_ok=True)
        environment = clean_environment(PIPEMOE_MPIRUN=str(mpirun), TMPDIR=str(tmp_path / "tmp"), STATE=str(tmp_path))
        environment |= settings
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True}
        command = [MPIRUN, "-n", "2", "x.py"]
        running.append(subprocess.Popen(command, env=environment, preexec_fn=heed_signals, **pipes))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('touch "$PIPEMOE_JOB_NOTES/exit70.1"; exit 71', 70),  # 70 | 3
        ('touch "$PIPEMOE_JOB_NOTES/exit70.1"; exit 0', 70),
        ("exit 7", 7),
        ("exit 0", 0),
    ],
)
def test_status_is_70_when_any_rank_says_so(start, tmp_path, text, status):
    process = start(text)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert not list((tmp_path / "tmp").iterdir())


# A rank that has stopped, as those do that nobody but SIGKILL ends, and one that gives up.
STOPPED = """
python3 -c 'import os, pathlib, signal
notes = pathlib.Path(os.environ["PIPEMOE_JOB_NOTES"])
(notes / f"segments.{os.getpid()}").write_text("")
(notes.parent / "rank").write_text(str(os.getpid()))
os.kill(os.getpid(), signal.SIGSTOP)' &
until [ -e "$PIPEMOE_JOB_NOTES/../rank" ]; do sleep 0.05; done
echo >"$PIPEMOE_JOB_NOTES/segments.1" # a number that has become another's
touch "$PIPEMOE_JOB_NOTES/exit70.2"
wait
"""


def test_an_mpirun_that_does_not_end_is_ended_with_its_ranks(start, tmp_path):
    process = start(STOPPED, PIPEMOE_END_SECONDS="1")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 70
    assert "a rank ended with status 70 1 s ago" in said
    rank = tmp_path / "tmp" / "rank"
    state = Path(f"/proc/{rank.read_text()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in ("Z", "X"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_job_whose_ranks_have_not_given_up_may_take_its_time(start):
    out, said = start("sleep 2.5; echo ended", PIPEMOE_END_SECONDS="1").communicate(timeout=60)
    assert out == "ended\n" and not said


@pytest.mark.parametrize("seconds", ["0", "-1", "1.5", "a minute"])
def test_seconds_that_are_none_are_refused(start, tmp_path, seconds):
    process = start("exit 0", PIPEMOE_END_SECONDS=seconds)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and f"PIPEMOE_END_SECONDS is '{seconds}'" in said
    assert not list((tmp_path / "tmp").iterdir())


def test_standard_input_reaches_the_ranks(start):
    assert start("cat").communicate("a line", timeout=30)[0] == "a line"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_mpirun_and_leaves_nothing(start, tmp_path, number):
    process = start('trap \'touch "$STATE/ended"; exit 143\' TERM; touch "$STATE/started"; sleep 60 & wait')
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(timeout=30) == 143
    assert (tmp_path / "ended").exists()
    assert not list((tmp_path / "tmp").iterdir())


@pytest.fixture
def segment():
    """A new file in /dev/shm, as MPI might make it."""
    if not os.access(shared_memory.FOLDER, os.W_OK):
        pytest.skip("no /dev/shm to write to")
    path = shared_memory.FOLDER / f"mpich_shm_test{os.getpid()}_0"
    path.write_bytes(bytes(4096))
    yield path
    path.unlink(missing_ok=True)


def test_a_job_takes_its_own_segments_with_it(start, segment):
    note = f'printf "%s\\n" {segment} /etc/hostname >"$PIPEMOE_JOB_NOTES/segments.1"; exit 1'
    start(note).communicate(timeout=30)
    assert not segment.exists() and Path("/etc/hostname").exists()


def test_a_segment_that_is_in_use_or_another_jobs_stays(start, segment):
    import mmap

    start("exit 1").communicate(timeout=30)
    assert segment.exists()
    assert segment in shared_memory.old_segments()
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert segment not in shared_memory.old_segments()
        assert str(segment) in shared_memory.segments_mapped_here()
        start(f'echo {segment} >"$PIPEMOE_JOB_NOTES/segments.1"; exit 1').communicate(timeout=30)
        assert segment.exists()
