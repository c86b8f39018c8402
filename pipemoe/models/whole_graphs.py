"""All layers of a slot's small steps as one CUDA graph each, routed experts included, on a rank without peers.

Where tokens are few, what the host does before the first layer takes as long as many layers on the device. Here a step
is one copy of numbers to the device, one graph, and `finish`:

    words     | where rows go, how many | token ids | positions | key rows | ends | query offsets | key lengths |
                2                         B           B           B          16     17 x 32 bits    16 x 32 bits

A graph of B rows serves any sequences of up to B tokens together, from one to 16 of them, of which none has earlier
keys. Its other rows are padding: their keys go to the padding's row, and they are routed to no expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch

from pipemoe.models.decoder import MicrobatchState
from pipemoe.models.fused_decoder import FusedDecoder
from pipemoe.models.graph_capture import collection_held
from pipemoe.models.packing import Packing, Piece
from pipemoe.models.step_keys import KeysOfMicrobatch, StepKeys
from pipemoe.plan.cost.model import GRAPH_ROWS

if TYPE_CHECKING:
    from pipemoe.models.decoder import Decoder
    from pipemoe.wire import WireRows

MOST_ROWS = 1024  # on more, the device is the bottleneck whoever enqueues
ROWS = (1, 2, 4, 8, 32, *(rows for rows in GRAPH_ROWS if rows <= MOST_ROWS))
MAX_SEQUENCES = 16  # in one step

Experts = Callable[[int, "WireRows", torch.Tensor], None]


def serves(decoder: Decoder) -> TypeGuard[FusedDecoder]:
    """Are there such graphs for a decoder?"""
    return isinstance(decoder, FusedDecoder) and decoder.ends_with_experts and decoder.rotates_by_position


class _Words:
    """A step's numbers for a graph of `num_rows` rows, on the host and on the device. Views of both by name."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        sizes = {"place": 2, "ids": num_rows, "positions": num_rows, "key_rows": num_rows, "ends": MAX_SEQUENCES}
        halves = {"offsets": MAX_SEQUENCES + 1, "lengths": MAX_SEQUENCES}  # int32, behind the int64 ones
        num_words = sum(sizes.values())
        count = num_words + -(-sum(halves.values()) // 2)
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(count, dtype=torch.int64, device=device)

        def views(words: torch.Tensor) -> dict[str, torch.Tensor]:
            split = words[:num_words].split(list(sizes.values()))
            half = words[num_words:].view(torch.int32)[: sum(halves.values())].split(list(halves.values()))
            return dict(zip([*sizes, *halves], [*split, *half], strict=True))

        self.of_device = views(self._device)
        self.of_host = {name: view.numpy() for name, view in views(self._host).items()}

    def send(self) -> None:
        """On the current stream; the step before must be complete."""
        self._device.copy_(self._host, non_blocking=True)


class WholeGraphs:
    """Of one slot of one runtime."""

    def __init__(
        self, decoder: FusedDecoder, keys: StepKeys, results_dtype: torch.dtype, experts: Any, scratch: Any
    ) -> None:
        """Capture on the current stream, which must not be the default one. keys: of the slot's steps. experts: only
        enqueue kernels; scratch: theirs, which bounds the rows. For set-up: allocates, and takes about a millisecond
        per layer and number of rows.
        """
        self.keys, self._decoder, self._pool = keys, decoder, torch.cuda.graph_pool_handle()
        most = min(MOST_ROWS, scratch.max_rows, keys.padding_row)
        all_rows = sorted({min(rows, most) for rows in ROWS})
        self.most_rows = all_rows[-1]
        self._rope = decoder.rope_table(self.most_rows)
        self._rows = decoder.wire.rows(
            torch.zeros((self.most_rows, decoder.wire.row_bytes), dtype=torch.uint8, device=decoder.device)
        )
        self._sums = torch.zeros((self.most_rows, decoder.shape.hidden), dtype=results_dtype, device=decoder.device)
        self._graphs: list[_WholeGraph] = []
        with collection_held():
            for num_rows in reversed(all_rows):  # the largest first: the others find memory for theirs
                self._graphs.insert(0, self._capture(num_rows, partial(_compute, experts, scratch)))
        torch.cuda.current_stream().synchronize()

    def serves(self, tokens: Sequence[torch.Tensor]) -> bool:
        """Can a step of these sequences' ids be run?"""
        return 0 < len(tokens) <= MAX_SEQUENCES and sum(map(len, tokens)) <= self.most_rows

    def run(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """Enqueue a step on the current stream, where the capture was. tokens: int64 ids of sequences that it
        `serves`, on the host. Returns logits [sequences, V] float32 of their last tokens.
        """
        num_tokens = sum(map(len, tokens))
        graph = next(graph for graph in self._graphs if graph.num_rows >= num_tokens)
        _fill(graph.words.of_host, tokens, self._rows.buffer.data_ptr(), self.keys.padding_row)
        graph.words.send()
        graph.graph.replay()
        state, ends = graph.state, graph.words.of_device["ends"]
        state.layer, state.packing.end_rows = self._decoder.shape.num_layers - 1, ends[: len(tokens)]
        return self._decoder.finish(state, self._sums[: graph.num_rows])

    def _capture(self, num_rows: int, experts: Experts) -> _WholeGraph:
        whole = _WholeGraph(self._decoder, self.keys, num_rows)
        rows, sums = self._rows[:num_rows], self._sums[:num_rows]
        _fill(whole.words.of_host, [torch.zeros(num_rows, dtype=torch.int64)], 0, self.keys.padding_row)
        whole.words.send()  # a place of no rows: the first launches write and route none
        whole.enqueue(self._rope, rows, sums, experts)  # libraries set themselves up outside a capture
        whole.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            whole.enqueue(self._rope, rows, sums, experts)
        finally:
            whole.graph.capture_end()
        whole.graph.replay()  # the first launch uploads it
        return whole


def _compute(experts: Any, scratch: Any, layer: int, rows: WireRows, sums: torch.Tensor) -> None:
    are_few = len(sums) <= experts.most_few_rows(layer)
    (experts.on_few_rows if are_few else experts)(layer, rows, sums, scratch)


class _WholeGraph:
    """The graph of `num_rows` rows, what it reads, and the state that it leaves."""

    def __init__(self, decoder: FusedDecoder, keys: StepKeys, num_rows: int) -> None:
        self._decoder, self.num_rows, self.graph = decoder, num_rows, torch.cuda.CUDAGraph()
        self.words = _Words(num_rows, decoder.device)
        words, ids = self.words.of_device, torch.zeros(num_rows, dtype=torch.long, device="cpu")
        packing = Packing(ids, [Piece(0, 0, num_rows, num_rows)], decoder.vocab_size, decoder.device, [0])
        packing.query_offsets = packing.key_offsets = words["offsets"]
        packing.key_lengths = words["lengths"]
        # A bound. For 1, torch's flash kernel would take each of the pieces to have a token, and some have none.
        packing.max_query = max(2, num_rows)
        nothing = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
        self.state = MicrobatchState(packing, KeysOfMicrobatch(keys, words["key_rows"]), nothing, ())

    @torch.no_grad()
    def enqueue(
        self,
        rope: tuple[torch.Tensor, torch.Tensor],
        rows: WireRows,
        sums: torch.Tensor,
        experts: Experts,
    ) -> None:
        from pipemoe_kernels.placed_rows import PlacedRows

        state, words, decoder = self.state, self.words.of_device, self._decoder
        placed = PlacedRows(words["place"], rows.stride)
        rows.ids.fill_(-1)  # padding stays so
        state.layer, state.moe_input = -1, None
        state.hidden = decoder.embed(words["ids"])
        state.rope = tuple(table.index_select(0, words["positions"]).unsqueeze(0) for table in rope)
        for layer in range(decoder.shape.num_layers):
            decoder.attend(state, layer, sums if layer else None, placed)
            decoder.run_shared(state)
            experts(layer, rows, sums)


def _fill(words: dict[str, np.ndarray], tokens: Sequence[torch.Tensor], address: int, padding_row: int) -> None:
    """The numbers of a step whose rows go to `address` (0: of no rows at all)."""
    num_tokens, at = sum(map(len, tokens)), 0
    words["place"][:] = address, num_tokens if address else 0
    words["key_rows"][:num_tokens], words["key_rows"][num_tokens:] = np.arange(num_tokens), padding_row
    words["ids"][num_tokens:] = words["positions"][num_tokens:] = 0
    words["lengths"][len(tokens) :], words["offsets"][len(tokens) :] = 0, num_tokens
    for i, ids in enumerate(tokens):
        stop = at + len(ids)
        words["ids"][at:stop], words["positions"][at:stop] = ids.numpy(), np.arange(len(ids))
        words["offsets"][i], words["lengths"][i], words["ends"][i] = at, len(ids), stop - 1
        at = stop
