"""The source seam: where a run's tokens come from and where their results go, on this rank.

`attend`, `rows` and `finish` run in the cohort's compute lane; `results` is called when a combine is posted. Cohorts
are named by their index in the plan, and only cohorts with tokens of this rank are asked for. Gradients are off.

An exception in any of them fails its cohort's rows on this rank, not the step. The caller gets it, and every rank hears
of it at the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from pipemoe.addresses import Call
    from pipemoe.plan.cost.dimensions import Dimensions
    from pipemoe.plan.cost.model import CostModel
    from pipemoe.plan.schedule import Plan
    from pipemoe.runtime.lanes import Event
    from pipemoe.wire import WireRows
    from pipemoe.world.world import World


@dataclass(frozen=True, slots=True)
class SourceTraits:
    """What a runtime must know of its sources before the first step: what to compare, to price and to reserve.

    The defaults are those of a source that only hands over tensors that are already there.
    """

    must_agree: Mapping[str, str] = field(default_factory=dict)  # by name, equal on all ranks: MismatchError otherwise
    dimensions: Dimensions | None = None  # of the whole model, for its cost; None: attention as the shape suggests
    # Measures what attention costs, where the dimensions do not tell. Every rank calls, at set-up, unless a cost file
    # tells: the costs so far, the most tokens of a step, and what runs work where attention runs. Returns the same on
    # every rank.
    measured_cost: Callable[[World, CostModel, int, Callable[[Callable[[], None]], None]], CostModel] | None = None
    # Model code as large as an attend may run. On a GPU it runs once in every lane, whose memory is then reserved.
    trial: Callable[[], None] | None = None
    kept_bytes: int = 0  # that model code may keep from layer to layer; reserved beside the trial's
    # Runs once in every slot's compute lane after the trial, on a GPU: the slot's number, the results' dtype.
    prepare: Callable[[int, torch.dtype], None] | None = None
    # Runs once in every slot's compute lane after that, on a rank without peers: as `prepare`, and the experts with the
    # slot's scratch.
    prepare_whole: Callable[[int, torch.dtype, Any, Any], None] | None = None
    graph_rows: int = 0  # most tokens whose attention is launched as a graph
    graph_cuts: bool = False  # also where sequences are cut
    # Calls inside a step allocate a layer's results on the caller's stream, the current one; reserved on a GPU.
    hands_out_results: bool = False


class Source(Protocol):
    has_side_work: bool  # whether `side_work` does anything
    keeps_tensors: bool  # whether `graphs` may be asked: `results` are the same tensors in every layer
    # Whether `attend` takes `rows`; only in lanes that run work as it is submitted (CUDA streams).
    writes_rows: bool

    def begin(self, plan: Plan, rank: int) -> None:
        """Called once, before the first operation."""

    def ready(self, cohort: int, layer: int) -> bool:
        """May `attend(cohort, layer)` be issued now? After False the conductor asks again later."""

    def attend(self, cohort: int, layer: int, rows: WireRows | None = None) -> None:
        """Take in the results of layer - 1 and produce this layer's rows.

        rows: where all of them go, in their order, in wire format; `rows` is not asked for them then. Only if the
        source `writes_rows`, and this rank's part of the cohort is one segment.
        """

    def whole(self, plan: Plan) -> Callable[[], None] | None:
        """What enqueues a whole step, in place of everything from `begin` to `finish`, routed experts included. None:
        it has to be issued operation by operation. Asked on ranks without peers, about plans of one cohort in one wave.
        """

    def graphs(self, cohort: int, rows_of: Sequence[WireRows]) -> Sequence[tuple[int, int]] | None:
        """Of a cohort whose layer 0 has been attended: handles of the CUDA graphs that `attend` and `side_work` launch
        in each layer (0: nothing), if they do nothing else; `rows` are then the same tensors in every layer. None: they
        have to be called. Runs in the compute lane, and only if the source `keeps_tensors`.

        rows_of: what `attend` would be given as `rows`, of layers that take turns; empty: nothing.
        """

    def prepared(self, cohort: int) -> Sequence[Sequence[Call]]:
        """Of a cohort whose layer 0 has been attended: for each layer calls of compiled code that do what `attend`
        does, none for layer 0; empty if it has to be called. `rows` are then the same tensors in every layer, which the
        calls write. Asked on the host, in the compute lane, and only if the source `keeps_tensors`.
        """

    def is_at(self, cohort: int, layer: int) -> None:
        """Calls of `prepared` have attended all layers up to this one."""

    def rows(self, cohort: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [n, H], ids [n, K] int32, weights [n, K] float32 of this rank's tokens [start, stop)."""

    def side_work(self, cohort: int) -> None:
        """Work that needs no experts of other ranks, such as shared experts. It runs in the compute lane while rows
        are dispatched.
        """

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        """The tensor for the sums of tokens [start, stop): [n, H], contiguous."""

    def combined(self, cohort: int, layer: int, event: Event) -> None:
        """A combine that writes this rank's results has been issued; `event` marks its end."""

    def finish(self, cohort: int) -> None:
        """Take in the results of the last layer."""

    def finished(self, cohort: int, seconds: float) -> None:
        """`finish` was complete at `seconds` of time.perf_counter."""
