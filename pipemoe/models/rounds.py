"""A decoder's side of rolling steps: room for keys and values between rounds, and the source of each round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pipemoe.models.kept_places import KeptPlaces
from pipemoe.models.round_source import First, RoundSource

if TYPE_CHECKING:
    import torch

    from pipemoe.config import Config
    from pipemoe.models.decoder import Decoder
    from pipemoe.models.graph_store import GraphStore
    from pipemoe.models.packing import Piece


class Part(NamedTuple):
    """Tokens [start, stop) of a sequence in a round; `sequence` is its number."""

    sequence: int
    start: int
    stop: int
    tokens: torch.Tensor  # of the whole sequence, [T] int64 on the host
    is_void: bool = False  # travels, as promised, but its keys are broken and nobody wants its result


class DecoderRounds:
    """One decoder under one configuration, in as many slots as its rounds have.

    Each slot has an area of its own for keys and values, so that long sequences leave room for short ones.
    """

    def __init__(
        self,
        decoder: Decoder,
        graphs: GraphStore,
        config: Config,
        results_dtype: torch.dtype,
        rows_of_slots: Sequence[int],
        *,
        writes_rows: bool,
        keep_logits: bool,
    ) -> None:
        """rows_of_slots: how many tokens' keys and values each slot can hold. On a GPU their memory is reserved here,
        and every slot's graphs must be captured (again) before the first round; waits for the device.
        """
        self._decoder, self._graphs, self._config = decoder, graphs, config
        self._results_dtype, self._writes_rows, self._keep_logits = results_dtype, writes_rows, keep_logits
        self._keys = graphs.keep(config, sum(rows_of_slots), max(rows_of_slots))
        self._cache = decoder.new_step() if self._keys is None else None
        firsts = [sum(rows_of_slots[:slot]) for slot in range(len(rows_of_slots))]
        self.places = [KeptPlaces(first, rows) for first, rows in zip(firsts, rows_of_slots)]
        self._held: dict[int, tuple[int, int, int]] = {}  # by sequence: slot, first row, rows

    def reserve(self, slot: int, sequence: int, length: int) -> bool:
        """Room for a sequence's keys and values, until `release`. False: there is none at present."""
        first = self.places[slot].take(length)
        if first is not None:
            self._held[sequence] = slot, first, length
        return first is not None

    def release(self, sequence: int) -> None:
        """The sequence has passed all layers for the last time."""
        slot, first, length = self._held.pop(sequence)
        self.places[slot].give_back(first, length)
        if self._cache is not None:
            self._cache.drop(sequence)

    def source(self, slot: int, parts: Sequence[Part], on_first: Callable[[First], None]) -> RoundSource:
        """A round's source, of these parts in this order."""
        step: Any = self._cache
        if self._keys is not None:
            step = self._keys.step({part.sequence: self._held[part.sequence][1] for part in parts})
        return RoundSource(
            self._decoder,
            self._graphs.graphs(self._config, slot, self._results_dtype),
            step,
            [part.tokens[part.start : part.stop] for part in parts],
            [_piece(part) for part in parts],
            self._results_dtype,
            keep_logits=self._keep_logits,
            writes_rows=self._writes_rows,
            on_first=on_first,
        )


def _piece(part: Part) -> Piece:
    """A void part reads no earlier keys, and ends no sequence."""
    from pipemoe.models.packing import Piece

    count = part.stop - part.start
    if part.is_void:
        return Piece(part.sequence, 0, count, count + 1)
    return Piece(part.sequence, part.start, part.stop, len(part.tokens))
