"""Servers of a benchmark that compares implementations: each a process of its own, kept warm, asked over pipes.

    client                                  server
      | <- {"impl": ..., "num_ranks": ...}     |    once the model is ready; or {"absent": why} and the end
      | {"tokens": 16, "rounds": 5, ...} ->    |    one JSON object a line, in both directions
      | <- {"ttft_ms": [...], ...}             |    or {"error": why} and the end
      | end of file ->                         |    the server ends

What anything else writes to standard output in a server goes to standard error. Only the standard library is needed: a
server may run an older pipemoe, or none.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any


def prompt(seed: int, num_tokens: int, number: int, rank: int, vocab_size: int) -> list[int]:
    """Token ids of a rank's prompt number `number` of this length: the same in every implementation."""
    draw = random.Random(f"{seed} {num_tokens} {number} {rank}")
    return draw.choices(range(vocab_size), k=num_tokens)


class Answers:
    """The server's side."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, answer: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()

    @staticmethod
    def requests() -> Iterator[dict[str, Any]]:
        """Until the client closes its end."""
        for line in iter(sys.stdin.readline, ""):
            yield json.loads(line)


class ServerError(Exception):
    """A server said that it cannot go on, went away, or took too long."""


@contextmanager
def start_undisturbed() -> Iterator[None]:
    """SIGTERM waits until the server that is started meanwhile is noted, by who would end it. For the main thread."""
    handler, came = signal.getsignal(signal.SIGTERM), []
    signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
    if came:
        signal.raise_signal(signal.SIGTERM)


class Server:
    """The client's side: a running server."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            bufsize=0,
            start_new_session=True,  # with what it starts itself, a group of its own
        )
        self._unread = b""

    def read(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises ServerError."""
        stop, source = time.monotonic() + seconds, self._process.stdout
        assert source is not None
        with selectors.DefaultSelector() as selector:
            selector.register(source, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, stop - time.monotonic())):
                    raise ServerError(f"{self.name}: no answer within {seconds:.0f} s")
                piece = os.read(source.fileno(), 1 << 16)
                if not piece:
                    raise ServerError(f"{self.name}: ended with status {self._process.wait()}")
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise ServerError(f"{self.name}: {answer['error']}")
        return answer

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises ServerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise ServerError(f"{self.name}: ended with status {self._process.wait()}") from error
        return self.read(seconds)

    def close(self, seconds: float = 10.0) -> None:
        """Let it end by itself, or make it; whatever it has started ends too."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for end in (None, signal.SIGTERM, signal.SIGKILL):
            try:
                if end is not None:
                    os.killpg(self._process.pid, end)
                self._process.wait(seconds)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def serve(answers: Answers, answer_to: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Answer every request until there are no more; an exception is told to the client first."""
    for request in answers.requests():
        try:
            answer = answer_to(request)
        except Exception as error:
            answers.send({"error": f"{type(error).__name__}: {error}"})
            raise
        answers.send(answer)
