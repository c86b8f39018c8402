"""What a process says before it ends, and its end: both in time, whoever reads, or hangs."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

EXIT_CODE = 70  # of a process that ended because the ranks could no longer work together (EX_SOFTWARE)
OUTPUT_SECONDS = 1.0
_NOTES_VARIABLE = "PIPEMOE_JOB_NOTES"  # launch/mpirun.sh: a folder for what it must know of its ranks


def say(text: str) -> None:
    """A line on standard error."""
    _in_time(lambda: print(text, file=sys.stderr, flush=True))


def exit_now() -> None:
    """End the process with EXIT_CODE, without the clean-ups of others, which would wait for the peers."""
    try:
        note(f"exit{EXIT_CODE}.{os.getpid()}", "")
        for stream in (sys.stdout, sys.stderr):
            _in_time(stream.flush)
    finally:
        os._exit(EXIT_CODE)


def exit_after(seconds: float) -> None:
    """`exit_now` in `seconds`, whatever the process does meanwhile."""

    def end() -> None:
        threading.Event().wait(seconds)
        exit_now()

    threading.Thread(target=end, name="pipemoe end", daemon=True).start()


def note(name: str, text: str) -> None:
    """Leave the launcher a file, if it wants any; on another host than its own there may be no such folder."""
    folder = os.environ.get(_NOTES_VARIABLE)
    if folder:
        _in_time(lambda: Path(folder, name).write_text(text))


def _in_time(work: Callable[[], object]) -> None:
    """Run `work` for a second at most: what is written to a launcher that has died may block, or raise."""

    def guarded() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the last: no stream at all
            work()

    thread = threading.Thread(target=guarded, name="pipemoe output", daemon=True)
    thread.start()
    thread.join(OUTPUT_SECONDS)
