"""What a run keeps of each cohort and of each buffer: how far they are on this rank."""

from __future__ import annotations

from collections import deque
from typing import Any

from pipemoe.runtime.lanes import Event


class CohortState:
    """How far one cohort is on this rank."""

    def __init__(self, has_tokens: bool) -> None:
        self.positions: deque[int] = deque()  # of its operations in the plan's order, not yet issued
        self.has_tokens = has_tokens
        self.groups = 0  # of dispatches, under way
        self.results: list[Event] = []  # combines of this rank's rows in the layer
        self.attended: Event | None = None  # the last attend
        self.in_place: bool | None = None  # see Run._writes_in_place
        self.failure: BaseException | None = None


class BufferState:
    """The last users of one double buffer of a slot."""

    dispatched: Event | None = None  # the receive buffer holds a wave
    read: Event | None = None  # experts have read the receive buffer and written the partial sums
    sent: Event | None = None  # the combine is done with the partial sums
    # of shared memory: its use by the last wave (pipemoe.plan.reuse), and this rank's rows of it have been written
    use: Any = None
    written: Event | None = None
    # of messages to and from ranks of other hosts: the rows have been moved, and the partial sums
    rows_moved: Event | None = None
    sums_moved: Event | None = None
