"""Where the ranks of a fuzz job compare outcomes: a socket of their own, which no fault of the library can disturb."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any


class Absent(Exception):
    """Another rank has not come in time, or has gone."""


class Meeting:
    """All-gather of small JSON documents between `size` ranks, through rank 0."""

    def __init__(self, folder: Path, rank: int, size: int, seconds: float) -> None:
        """seconds: how long ranks wait for one another."""
        self.rank, self.size, self._files = rank, size, []
        address = str(folder / "meeting")
        if rank == 0:
            self._server = socket.socket(socket.AF_UNIX)
            self._server.bind(address)
            self._server.listen()
            sockets = [self._server.accept()[0] for _ in range(size - 1)]
        else:
            sockets = [_connected(address, seconds)]
        for one in sockets:
            one.settimeout(seconds)
            self._files.append(one.makefile("rwb"))

    def all(self, mine: Any) -> list[Any]:
        """Every rank's document, in the order of ranks. Raises Absent."""
        try:
            if self.rank:
                self._send(self._files[0], [self.rank, mine])
                return self._receive(self._files[0])
            documents = {0: mine} | dict(self._receive(file) for file in self._files)
            everything = [documents[rank] for rank in range(self.size)]
            for file in self._files:
                self._send(file, everything)
            return everything
        except (OSError, ValueError) as error:
            raise Absent(f"{type(error).__name__}: {error}") from None

    @staticmethod
    def _send(file: Any, document: Any) -> None:
        file.write(json.dumps(document).encode() + b"\n")
        file.flush()

    @staticmethod
    def _receive(file: Any) -> Any:
        return json.loads(file.readline())


def _connected(address: str, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        one = socket.socket(socket.AF_UNIX)
        try:
            one.connect(address)
            return one
        except OSError:
            one.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # rank 0 has yet to listen
