"""The model's source: a decoder gives a step its rows, takes the results, and makes first tokens of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pipemoe.addresses import Call
    from pipemoe.models.cache import StepCache
    from pipemoe.models.decoder import Decoder
    from pipemoe.models.microbatch import AttendGraphs, EagerMicrobatch, GraphedMicrobatch
    from pipemoe.models.step_keys import StepOfKeys
    from pipemoe.models.whole_graphs import WholeGraphs
    from pipemoe.plan.schedule import Plan
    from pipemoe.wire import WireRows


@dataclass(frozen=True, slots=True)
class Prefilled:
    """This rank's results, one per sequence, in the order given."""

    first_tokens: list[int]
    ttft_seconds: list[float]  # from the call of prefill to the sequence's first token
    logits: torch.Tensor | None  # [sequences, V] float32, if asked for
    finite: list[bool]  # False: the sequence's logits hold NaN or infinity, so its first token means nothing


class ModelSource:
    """Rows from the decoder; results back into it."""

    keeps_tensors = True

    def __init__(
        self,
        decoder: Decoder,
        graphs: list[AttendGraphs | None],
        new_step: Callable[[Sequence[int]], StepCache | StepOfKeys],
        tokens: list[torch.Tensor],
        results_dtype: torch.dtype,
        keep_logits: bool,
        writes_rows: bool = False,
        whole: WholeGraphs | None = None,
    ) -> None:
        """graphs: per slot. new_step: see GraphStore.new_step. writes_rows: the decoder writes rows in wire format, as
        they travel. whole: of slot 0.
        """
        self._decoder, self._graphs, self._tokens, self._results_dtype = decoder, graphs, tokens, results_dtype
        self._new_step, self._keep_logits = new_step, keep_logits
        self.has_side_work = decoder.has_shared_experts
        self.writes_rows, self._whole = writes_rows, whole
        self._microbatches: dict[int, EagerMicrobatch | GraphedMicrobatch] = {}  # per cohort
        self._rows: dict[int, tuple] = {}
        self._ranges: dict[int, list[tuple[int, int, int]]] = {}  # per cohort: start, stop, row
        self._ended: dict[int, list[int]] = {}  # per cohort: sequences whose last token it holds
        self._first: dict[int, tuple] = {}  # per cohort: what `first_token` reads (host), logits
        self._seconds: dict[int, float] = {}

    def begin(self, plan: Plan, rank: int) -> None:
        self._bounds = plan.facts.boundaries[rank]
        self._step = self._new_step(self._bounds)
        self._slots = [cohort.slot for cohort in plan.cohorts]
        for c, cohort in enumerate(plan.cohorts):
            row, ranges = 0, []
            for m in sorted(m for m in cohort.microbatches if m.rank == rank):
                ranges.append((m.start, m.stop, row))
                row += m.stop - m.start
            self._ranges[c] = ranges

    def ready(self, cohort: int, layer: int) -> bool:
        return True

    def whole(self, plan: Plan) -> Callable[[], None] | None:
        """See Source.whole."""
        graphs = self._whole
        if graphs is None or plan.cohorts[0].slot or not graphs.serves(self._tokens):
            return None
        return partial(self._run_whole, graphs)

    def _run_whole(self, graphs: WholeGraphs) -> None:
        self._ended[0] = list(range(len(self._tokens)))
        self._take_logits(0, graphs.run(self._tokens))

    def attend(self, cohort: int, layer: int, rows: WireRows | None = None) -> None:
        if layer == 0:
            self._start(cohort)
        self._rows[cohort] = self._microbatches[cohort].attend(layer, rows)

    def _start(self, cohort: int) -> None:
        import torch

        from pipemoe.models.microbatch import start_microbatch
        from pipemoe.models.packing import Piece

        pieces: list[Piece] = []
        for start, stop, _ in self._ranges[cohort]:
            for i, (begin, end) in enumerate(zip(self._bounds, self._bounds[1:])):
                a, b = max(start, begin) - begin, min(stop, end) - begin
                if a >= b:
                    continue
                if pieces and pieces[-1].sequence == i and pieces[-1].stop == a:
                    a = pieces.pop().start  # two chunks side by side in one cohort
                pieces.append(Piece(i, a, b, end - begin))
        ids = torch.cat([self._tokens[p.sequence][p.start : p.stop] for p in pieces])
        self._ended[cohort] = [p.sequence for p in pieces if p.stop == p.length]
        graphs = self._graphs[self._slots[cohort]]
        self._microbatches[cohort] = start_microbatch(
            self._decoder, graphs, self._step, ids, pieces, self._results_dtype
        )

    def graphs(self, cohort: int, rows_of: Sequence[WireRows]) -> tuple[tuple[int, int], ...] | None:
        """See Source.graphs."""
        return self._microbatches[cohort].graphs(rows_of)

    def prepared(self, cohort: int) -> list[list[Call]]:
        """See Source.prepared."""
        return self._microbatches[cohort].prepared(self._rows[cohort])

    def is_at(self, cohort: int, layer: int) -> None:
        """See Source.is_at."""
        self._microbatches[cohort].is_at(layer)

    def _row(self, cohort: int, token: int) -> int:
        return next(row + token - start for start, stop, row in self._ranges[cohort] if start <= token < stop)

    def rows(self, cohort: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = self._row(cohort, start)
        x, ids, weights = self._rows[cohort]
        return x[row : row + stop - start], ids[row : row + stop - start], weights[row : row + stop - start]

    def side_work(self, cohort: int) -> None:
        self._microbatches[cohort].run_shared()

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        row = self._row(cohort, start)
        return self._microbatches[cohort].sums[row : row + stop - start]

    def combined(self, cohort: int, layer: int, event: Any) -> None:
        pass

    def finish(self, cohort: int) -> None:
        self._take_logits(cohort, self._microbatches[cohort].finish())

    def _take_logits(self, cohort: int, logits: torch.Tensor) -> None:
        """logits: of the sequences that the cohort ends."""
        from pipemoe.models.first_tokens import first_tokens

        self._first[cohort] = (first_tokens(logits), logits if self._keep_logits else None)

    def finished(self, cohort: int, seconds: float) -> None:
        self._seconds[cohort] = seconds

    def prefilled(self, begin: float) -> Prefilled:
        """The step's results, once it is over. begin: when it was called, in seconds of time.perf_counter."""
        import torch

        from pipemoe.models.first_tokens import first_token

        count = len(self._tokens)
        first, finite, seconds = [0] * count, [True] * count, [0.0] * count
        logits: list[Any] = [None] * count
        for cohort, (tokens, scores) in self._first.items():
            if scores is not None and scores.is_cuda:
                scores.record_stream(torch.cuda.current_stream())  # made on a lane's stream, read on the caller's
            for i, sequence in enumerate(self._ended[cohort]):
                first[sequence], finite[sequence] = first_token(tokens, i)
                seconds[sequence] = self._seconds[cohort] - begin
                logits[sequence] = scores[i] if scores is not None else None
        kept = torch.stack(logits) if self._keep_logits and count else None
        return Prefilled(first, seconds, kept, finite)
