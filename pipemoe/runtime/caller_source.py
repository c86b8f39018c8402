"""The caller's source: the layer calls of a PipelinedMoE give a step its rows, and return the results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from pipemoe.plan.schedule import Plan
    from pipemoe.runtime.lanes import Event
    from pipemoe.wire import WireRows


class _Given(NamedTuple):
    """One layer's call."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    sums: torch.Tensor  # where its results go
    event: Any  # a mark behind what has made the tensors; None on the host


class CallerSource:
    """Rows from the caller's layer calls; results into tensors that the calls return."""

    has_side_work = keeps_tensors = writes_rows = False

    def __init__(self, num_layers: int, wake: Callable[[], None], new_mark: Callable[[], Any]) -> None:
        """wake: wakes the conductor, which then asks again. new_mark: see Lanes."""
        self._wake, self._new_mark = wake, new_mark
        self.begun = threading.Event()
        self.is_empty = False  # has no rank any token in this step? Known once it has begun
        self.issued = [threading.Event() for _ in range(num_layers)]
        self.events: list[list[Event]] = [[] for _ in range(num_layers)]
        self._inputs: list[_Given | None] = [None] * num_layers
        self._layer: dict[int, int] = {}  # per cohort
        self._error: BaseException | None = None
        self._due = 0

    def give(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, sums: torch.Tensor) -> None:
        """Take a layer's rows and the tensor for its sums. Other streams use them, so they are kept until `forget`."""
        event = None
        if x.is_cuda:
            event = self._new_mark()
            event.record()
        self._inputs[layer] = _Given(x, ids, weights, sums, event)
        self._wake()

    def forget(self, layer: int) -> None:
        """Let go of a layer's tensors. The caller's next work comes after all of the layer's events."""
        self._inputs[layer] = None
        self.events[layer].clear()

    def forget_all(self) -> None:
        """Let go of all tensors, once the step has ended."""
        self._inputs = [None] * len(self._inputs)
        self.events = [[] for _ in self.events]

    def abandon(self, error: BaseException) -> None:
        self._error = error
        self._wake()

    def begin(self, plan: Plan, rank: int) -> None:
        self.is_empty = not any(map(any, plan.facts.lengths))
        self._due = sum(any(s.rank == rank for s in wave.segments) for cohort in plan.cohorts for wave in cohort.waves)
        self.begun.set()

    def ready(self, cohort: int, layer: int) -> bool:
        return self._inputs[layer] is not None or self._error is not None

    def attend(self, cohort: int, layer: int, rows: WireRows | None = None) -> None:
        import torch

        given = self._inputs[layer]
        if given is None:
            assert self._error is not None  # or the layer would not have been ready
            raise self._error
        self._layer[cohort] = layer
        if given.event is not None:
            given.event.let_wait(torch.cuda.current_stream().cuda_stream)

    def rows(self, cohort: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        given = self._given(cohort)
        return given.x[start:stop], given.ids[start:stop], given.weights[start:stop]

    def whole(self, plan: Plan) -> None:
        pass

    def graphs(self, cohort: int, rows_of: Sequence[WireRows]) -> None:
        pass

    def prepared(self, cohort: int) -> tuple[()]:
        return ()

    def is_at(self, cohort: int, layer: int) -> None:
        pass

    def side_work(self, cohort: int) -> None:
        pass

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        return self._given(cohort).sums[start:stop]

    def _given(self, cohort: int) -> _Given:
        given = self._inputs[self._layer[cohort]]
        assert given is not None  # until `forget`, which comes after the layer
        return given

    def combined(self, cohort: int, layer: int, event: Event) -> None:
        self.events[layer].append(event)
        if len(self.events[layer]) == self._due:
            self.issued[layer].set()

    def finish(self, cohort: int) -> None:
        pass

    def finished(self, cohort: int, seconds: float) -> None:
        pass
