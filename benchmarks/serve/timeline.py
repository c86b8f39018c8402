"""When requests waited and ran, as a Chrome trace, which Perfetto opens (https://ui.perfetto.dev)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from pipemoe.output_path import write_whole
from pipemoe.traffic.served import Served


def request_timeline(served: Sequence[Served]) -> dict[str, Any]:
    """A process per rank, and as many threads as it has requests at once. A request waits, and then runs until its
    first token. Times are microseconds from the first arrival.
    """
    events: list[dict[str, Any]] = []
    for rank in sorted({s.rank for s in served}):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        free: list[float] = []  # when each thread's last request is done
        for s in sorted((s for s in served if s.rank == rank), key=lambda s: s.arrival):
            if s.admitted is None or s.first_token is None:
                continue
            thread = next((i for i, end in enumerate(free) if end <= s.arrival), len(free))
            free[thread : thread + 1] = [s.first_token]
            args = {"request": s.number, "tokens": s.num_tokens}
            for name, begin, end in (("waits", s.arrival, s.admitted), ("runs", s.admitted, s.first_token)):
                where = {"pid": rank, "tid": 1 + thread}  # Perfetto takes thread 0 for the process's idle thread
                span = {"ph": "X", "name": name, "cat": name, "ts": begin * 1e6, "dur": (end - begin) * 1e6}
                events.append({**span, **where, "args": args})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_timeline(served: Sequence[Served], path: str | os.PathLike[str]) -> None:
    """Write it to a file."""
    write_whole(path, json.dumps(request_timeline(served)))
