"""A conductor whose thread cannot be set up: whoever waits for it is told at once."""

import subprocess
import sys

import pytest

from pipemoe.errors import ConfigError
from pipemoe.runtime.conductor import Conductor
from pipemoe.runtime.last_words import EXIT_CODE

PROGRAM = """
from pipemoe.errors import FatalError
from pipemoe.runtime.conductor import Conductor
def broken():
    raise OSError("planted in the set-up")
conductor = Conductor(0, watchdog_seconds=60.0, grace_seconds=0.5, set_up_thread=broken)
try:
    conductor.submit(lambda: None).result(timeout=30)
except FatalError as error:
    print(error, type(error.__cause__).__name__, flush=True)
conductor.close()
"""


def test_any_error_is_the_end_of_the_process():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100)
    assert result.stdout.strip() == "rank 0: OSError in idle: planted in the set-up OSError", result.stderr
    assert result.returncode == EXIT_CODE


def test_an_error_of_pipemoe_is_the_callers():
    def broken() -> None:
        raise ConfigError("planted in the set-up")

    conductor = Conductor(0, watchdog_seconds=60.0, grace_seconds=60.0, set_up_thread=broken)
    for _ in range(2):
        with pytest.raises(ConfigError, match="planted"):
            conductor.submit(lambda: None).result(timeout=30)
    assert conductor.failure is None
    conductor.close()
