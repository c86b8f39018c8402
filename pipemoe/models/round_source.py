"""The model's source of one round: chunks of sequences, whose earlier chunks went in earlier rounds of the slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipemoe.models.source import ModelSource

if TYPE_CHECKING:
    import torch

    from pipemoe.models.cache import StepCache
    from pipemoe.models.decoder import Decoder
    from pipemoe.models.microbatch import AttendGraphs
    from pipemoe.models.packing import Piece
    from pipemoe.models.step_keys import StepOfKeys
    from pipemoe.plan.schedule import Plan


class First(NamedTuple):
    """What a round found for a sequence that it ended."""

    sequence: int
    token: int
    is_finite: bool  # False: the logits hold NaN or infinity, so that the token means nothing
    logits: torch.Tensor | None  # [V] float32 on the host, if asked for
    seconds: float  # of time.perf_counter, when the token was there


class RoundSource(ModelSource):
    """Rows of this rank's chunks of a round, all in one cohort."""

    def __init__(
        self,
        decoder: Decoder,
        graphs: AttendGraphs | None,
        step: StepCache | StepOfKeys,
        tokens: Sequence[torch.Tensor],
        pieces: Sequence[Piece],
        results_dtype: torch.dtype,
        *,
        keep_logits: bool,
        writes_rows: bool,
        on_first: Callable[[First], None],
    ) -> None:
        """graphs: of the round's slot. step: where keys and values are kept between rounds; its `begins`, if it has
        any, are found by the pieces' numbers of their sequences. tokens: of each piece, [n] int64 on the host.
        on_first: called on the conductor's thread for each sequence that ends.
        """
        super().__init__(decoder, [], lambda begins: step, [], results_dtype, keep_logits, writes_rows)
        self._of_slot, self._step, self._chunks, self._pieces = graphs, step, list(tokens), list(pieces)
        self._on_first = on_first

    def begin(self, plan: Plan, rank: int) -> None:
        (cohort,) = plan.cohorts
        assert cohort.tokens_of(rank) == sum(map(len, self._chunks)), "the plan has other chunks"
        self._ranges[0] = [(0, cohort.tokens_of(rank), 0)]

    def _start(self, cohort: int) -> None:
        import torch

        from pipemoe.models.microbatch import start_microbatch

        self._ended[0] = [p.sequence for p in self._pieces if p.stop == p.length]
        self._microbatches[0] = start_microbatch(
            self._decoder, self._of_slot, self._step, torch.cat(self._chunks), self._pieces, self._results_dtype
        )

    def finish(self, cohort: int) -> None:
        import torch

        super().finish(cohort)
        first, logits = self._first[0]
        if logits is not None and logits.is_cuda:
            host = torch.empty(logits.shape, dtype=logits.dtype, device="cpu", pin_memory=True)
            self._first[0] = first, host.copy_(logits, non_blocking=True)

    def finished(self, cohort: int, seconds: float) -> None:
        from pipemoe.models.first_tokens import first_token

        tokens, logits = self._first[0]
        for i, sequence in enumerate(self._ended[0]):
            of: Any = None if logits is None else logits[i].clone()
            self._on_first(First(sequence, *first_token(tokens, i), of, seconds))
