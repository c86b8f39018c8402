"""How a rank prints an error that nobody catches.

An error of this rank alone is printed as Python does, before the rank says good-bye: when the others end, this process
may be ended too. An error that all ranks share, such as a wrong argument, is printed by one rank, with the caller's own
frames only. PIPEMOE_DEBUG=1 shows all frames of all ranks.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pipemoe.errors import FatalError, PipemoeError, words
from pipemoe.runtime.last_words import say
from pipemoe.world.departure import departure

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_FOREIGN = (
    _PACKAGE,
    "<frozen ",
    f"{os.sep}mpi4py{os.sep}",
    f"{os.sep}concurrent{os.sep}futures{os.sep}",
    f"{os.sep}runpy.py",
)
_HEARING_SECONDS, _PRINTING_SECONDS = 3.0, 5.0
_POLL_SECONDS = 0.005
_REASON_LENGTH = 300

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]
_previous: _Hook | None = None
_reason = ""


def install() -> None:
    """From now on, print uncaught errors this way. Errors that are not shared go to the hook that was there before."""
    global _previous, _reason
    _reason = ""
    if sys.excepthook is not _hook:
        _previous, sys.excepthook = sys.excepthook, _hook


def remove() -> None:
    """Put the earlier hook back, unless somebody has installed another one, which may call this one."""
    global _previous
    if sys.excepthook is _hook and _previous is not None:
        sys.excepthook, _previous = _previous, None


def reason_to_leave() -> str:
    """Why a world is closed: the exception being raised, or one that nobody caught. Empty if there is none."""
    error = sys.exception()
    return _reason if error is None else reason(error)


def reason(error: BaseException) -> str:
    """An error as one line for the peers. Empty for one that they have too, and for a normal exit."""
    if (
        is_shared(error)
        or isinstance(error, GeneratorExit)
        or (isinstance(error, SystemExit) and error.code in (None, 0))
    ):
        return ""
    text = " ".join(words(error).split())[:_REASON_LENGTH]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_shared(error: BaseException) -> bool:
    """Do all ranks raise it?"""
    return isinstance(error, PipemoeError) and error.is_shared


def say_once(error: BaseException, text: str) -> None:
    """Print an error's text on standard error. If all ranks share the error, only the lowest rank prints it."""
    channel = departure.channel
    if channel is None or not is_shared(error):
        say(text)
        return
    departure.will_fail_alike()
    key = hashlib.blake2b(str(error).encode(), digest_size=8).hexdigest()
    channel.tell(ends_by=key)
    lower = [peer for rank, peer in sorted(channel.peers.items()) if rank < channel.rank]
    _poll(lambda: all(p.news.get("ends_by") or p.news.get("exiting") or p.gone for p in lower), _HEARING_SECONDS)
    first = next((p for p in lower if p.news.get("ends_by") == key), None)
    if first is not None:
        _poll(lambda: first.news.get("has_said") == key or first.gone, _PRINTING_SECONDS)
    if first is None or first.news.get("has_said") != key:
        say(text)
        channel.tell(has_said=key)


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    global _reason
    _reason = reason(error)
    # The conductor has said it, with all that it knows.
    has_been_said = isinstance(error, FatalError) and error.__cause__ is None
    if not (is_shared(error) or has_been_said) or os.environ.get("PIPEMOE_DEBUG", "0") not in ("", "0"):
        (_previous or sys.__excepthook__)(kind, error, trace)
        return
    frames = [f for f in traceback.extract_tb(trace) if not any(part in f.filename for part in _FOREIGN)]
    lines = traceback.format_list(frames)
    head = ["Traceback (most recent call last; pipemoe's own frames with PIPEMOE_DEBUG=1):\n"] if lines else []
    say_once(error, "".join([*head, *lines, *traceback.format_exception_only(kind, error)]).rstrip("\n"))


def _poll(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
