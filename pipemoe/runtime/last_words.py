"""A process's last output and its end. Neither may hang, whoever reads the output."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

EXIT_CODE = 70  # of a process that ended because the ranks could no longer work together (EX_SOFTWARE)
OUTPUT_SECONDS = 1.0
_NOTES_VARIABLE = "PIPEMOE_JOB_NOTES"  # a folder where launch/mpirun.sh looks for notes of its ranks


def say(text: str) -> None:
    """A line on standard error."""
    _in_time(lambda: print(text, file=sys.stderr, flush=True))


def exit_now() -> None:
    """End the process with EXIT_CODE. Clean-ups of other libraries are left out: they would wait for the peers."""
    try:
        note(f"exit{EXIT_CODE}.{os.getpid()}", "")
        for stream in (sys.stdout, sys.stderr):
            _in_time(stream.flush)
    finally:
        os._exit(EXIT_CODE)


def exit_after(seconds: float) -> None:
    """Call `exit_now` in `seconds`, whatever the process does meanwhile."""

    def end() -> None:
        threading.Event().wait(seconds)
        exit_now()

    threading.Thread(target=end, name="pipemoe end", daemon=True).start()


def note(name: str, text: str) -> None:
    """Leave a file for the launcher, if it wants any. On other hosts than its own the folder may not exist."""
    folder = os.environ.get(_NOTES_VARIABLE)
    if folder:
        _in_time(lambda: Path(folder, name).write_text(text))


def _in_time(work: Callable[[], object]) -> None:
    """Run `work` for a second at most. Writing to a launcher that has died may block or raise."""

    def guarded() -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the last: no stream at all
            work()

    thread = threading.Thread(target=guarded, name="pipemoe output", daemon=True)
    thread.start()
    thread.join(OUTPUT_SECONDS)
