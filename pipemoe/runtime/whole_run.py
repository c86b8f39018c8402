"""A run whose operations are all one piece of work: the source enqueues every layer at once, routed experts included.

For a rank without peers and a plan of one cohort in one wave, where nothing is left to decide between the first
operation and the last. All operations count as done when the last one is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pipemoe.plan.schedule import Op, Plan

if TYPE_CHECKING:
    from pipemoe.runtime.lanes import Event, Lanes
    from pipemoe.runtime.source import Source

SPIN_SECONDS = 1e-3  # of one `advance`, which then gives back control


def is_one_piece(plan: Plan) -> bool:
    """Has a plan nothing to decide?"""
    return plan.facts.num_ranks == 1 and len(plan.cohorts) == 1 and len(plan.cohorts[0].waves) == 1


class WholeRun:
    """As Run; not for timed runs, nor for one side alone."""

    spins = True  # `advance` waits by itself
    num_own = 1

    def __init__(
        self,
        plan: Plan,
        rank: int,
        lanes: Lanes,
        transport: Any,
        workspace: Any,
        wire: Any,
        experts: Any,
        source: Source,
        *,
        work: Callable[[], None],
        only: Any = None,
        timed: bool = False,
        on_progress: Callable[[object], None] = lambda op: None,
        on_progress_made: Callable[[], None] = lambda: None,
        on_done: Callable[[Op], None] = lambda op: None,
    ) -> None:
        """Arguments: Run's, for a plan that `is_one_piece`. work: the source's `whole`, in place of its other functions
        but `finished`.
        """
        assert is_one_piece(plan) and not timed
        self._plan, self._source, self._work = plan, source, work
        self._lane = lanes.slots[plan.cohorts[0].slot].compute
        self._on_progress, self._on_progress_made, self._on_done = on_progress, on_progress_made, on_done
        self._event: Event | None = None
        self._is_done = False
        self.failure: BaseException | None = None  # of the caller's functions and of model code
        self.failed_op: Op | None = None
        self.completed: list[tuple[Op, Event]] = []
        self.issue_seconds: list[tuple[Op, float]] = []
        self.issued_seconds = 0.0
        self.own_finished = 0
        lanes.clock.start(timed)

    def of_caller(self, work: Callable[[], None]) -> None:
        """See Run.of_caller."""
        if self.failure is None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001
                self.failure = error

    def advance(self) -> bool:
        """See Run.advance. Gives back control after SPIN_SECONDS."""
        first, last = self._plan.ops[0], self._plan.ops[-1]
        if self._event is None:
            self._on_progress(first)
            begin = time.perf_counter()
            try:
                self._event = self._lane.submit(partial(self.of_caller, self._work), timed=True)
            except BaseException:
                self.failed_op = first
                raise
            self.issued_seconds = time.perf_counter() - begin
        until = time.perf_counter() + SPIN_SECONDS
        try:
            while not self._event.done():
                if time.perf_counter() > until:
                    return False
        except BaseException:
            self.failed_op = last
            raise
        if not self._is_done:
            self._is_done = True
            self.of_caller(partial(self._tell_finished, self._event))
            self.own_finished = 1
            for op in self._plan.ops:
                self._on_progress_made()
                self.of_caller(partial(self._on_done, op))
        return True

    def _tell_finished(self, event: Event) -> None:
        self._source.finished(0, event.end())

    def oldest(self) -> Op | None:
        """See Run.oldest: the last operation stands for all."""
        return None if self._event is None or self._is_done else self._plan.ops[-1]

    def not_begun(self) -> str | None:
        """See Run.not_begun."""
        return None
