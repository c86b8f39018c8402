"""A rank whose output nobody reads any more: its futures are settled and its process ends all the same."""

import os
import subprocess
import sys

import pytest

from pipemoe.runtime.last_words import EXIT_CODE

PROGRAM = """
import os, sys, time
from pipemoe.errors import FatalError
from pipemoe.runtime.conductor import Conductor
conductor = Conductor(0, watchdog_seconds=5.0, grace_seconds=3.0)  # longer than it may try to say why
said = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
def fail():
    raise FatalError("planted")
try:
    conductor.call(fail)
except FatalError as error:
    os.write(said, str(error).encode())
time.sleep(60)
"""


@pytest.mark.parametrize("broken", ["closed", "full"])
def test_the_process_ends(tmp_path, broken):
    read, write = os.pipe()
    if broken == "closed":
        os.close(read)
    else:
        os.set_blocking(write, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write, b"x" * 4096)
        os.set_blocking(write, True)
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "said")], stdout=write, stderr=write)
    assert process.wait(timeout=50) == EXIT_CODE
    assert (tmp_path / "said").read_text() == "planted"
