"""The side channel's lines: one JSON object each, in ASCII, never longer than MAX_LINE.

Text is cut before it is encoded, so a line is always whole JSON. The outbox keeps what a socket does not take at once,
so no line begins inside another.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections import deque

MAX_LINE = 1 << 16  # bytes, with the newline
# Characters kept of a longer text: its beginning and its end. JSON takes up to 12 bytes for one character.
_HEAD, _TAIL = 3500, 1500
_MOST_KEPT = 16  # lines that wait for a peer that does not read


def cut(text: str) -> str:
    """`text`, without its middle if it is long."""
    left_out = len(text) - _HEAD - _TAIL
    return text if left_out <= 0 else f"{text[:_HEAD]} ... ({left_out} characters left out) ... {text[-_TAIL:]}"


def encode_line(message: dict) -> bytes:
    """One line of at most MAX_LINE bytes. `message`: numbers, at most one text (cut if it is long), and nothing else of
    any size.
    """
    return (
        json.dumps({key: cut(value) if isinstance(value, str) else value for key, value in message.items()}).encode()
        + b"\n"
    )


def decode_line(line: bytes) -> dict | None:
    """The message, or None for anything else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


class LineReader:
    """Cuts what a socket gives into lines, and drops those longer than MAX_LINE. Keeps less than MAX_LINE bytes."""

    def __init__(self) -> None:
        self._begun = b""
        self._dropping = False  # in the middle of a line that was too long

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without their newlines."""
        *lines, rest = (self._begun + data).split(b"\n")
        if lines and self._dropping:
            del lines[0]
            self._dropping = False
        if self._dropping or len(rest) >= MAX_LINE:
            self._dropping, rest = True, b""
        self._begun = rest
        return [line for line in lines if len(line) < MAX_LINE]


class Outbox:
    """Lines that wait for one peer. For one thread at a time."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()  # the first one may have been sent in part

    def __bool__(self) -> bool:
        return bool(self._lines)

    def put(self, line: bytes, *, keep: bool) -> None:
        """Hand in a line. Unless `keep`, it is dropped while others wait: the next heartbeat says more."""
        if len(self._lines) < (_MOST_KEPT if keep else 1):
            self._lines.append(line)

    def clear(self) -> None:
        self._lines.clear()

    def send(self, connection: socket.socket) -> None:
        """Send as much as the (non-blocking) socket takes. Raises OSError if it is broken."""
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while self._lines:
                sent = connection.send(self._lines[0])
                if sent < len(self._lines[0]):
                    self._lines[0] = self._lines[0][sent:]
                else:
                    self._lines.popleft()
