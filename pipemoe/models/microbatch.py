"""A microbatch on its way through a decoder: attention launched kernel by kernel, or as CUDA graphs.

The host takes about a millisecond to launch the fifty or so kernels of a layer's attention; the GPU computes 2000
tokens in less than that. Graphs are captured at set-up, one per MoE layer and bucket of token counts:

    tokens of the microbatch    |  7 tokens | 9 rows of padding |     bucket of 16: the graph always computes 16 rows
    rows handed on              |  7 tokens |                         padding is never dispatched

A slot holds one microbatch at a time, so all graphs of a slot share their inputs, outputs and memory. With StepKeys
they also serve pieces of sequences that are cut over several microbatches, without only whole sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from pipemoe.models.cache import StepCache
from pipemoe.models.decoder import Decoder, MicrobatchState
from pipemoe.models.fused_decoder import FusedDecoder
from pipemoe.models.graph_capture import collection_held
from pipemoe.models.packing import Packing, Piece
from pipemoe.models.step_keys import KeysOfMicrobatch, StepKeys, StepOfKeys
from pipemoe.plan.cost.model import GRAPH_ROWS
from pipemoe.wire import WireRows

if TYPE_CHECKING:
    from pipemoe.addresses import Call

MAX_PIECES = 16  # sequences in one graph
NUM_PLACES = 2  # of rows; layers take turns, as their receive buffers do

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [n, H], ids [n, K], weights [n, K]


class _Place:
    """Where graphs write wire rows: an address and a number of rows in device memory."""

    def __init__(self, decoder: FusedDecoder) -> None:
        from pipemoe_kernels.placed_rows import PlacedRows

        self._known = [0, 0]
        self.rows = PlacedRows(torch.zeros(2, dtype=torch.int64, device=decoder.device), decoder.wire.row_bytes)

    def point_to(self, rows: WireRows) -> None:
        """On the current stream; most layers find the place of two layers before."""
        for i, value in enumerate((rows.buffer.data_ptr(), len(rows))):
            if self._known[i] != value:
                self.rows.place[i].fill_(value)
                self._known[i] = value


class EagerMicrobatch:
    """Any pieces, launched kernel by kernel. `sums` [T_mb, H]: where the routed experts' results of a layer belong."""

    def __init__(self, decoder: Decoder, state: MicrobatchState, results_dtype: torch.dtype) -> None:
        self._decoder, self._state = decoder, state
        self.sums = torch.zeros(
            (state.packing.num_tokens, decoder.shape.hidden), dtype=results_dtype, device=decoder.device
        )

    def attend(self, layer: int, rows: WireRows | None = None) -> Routed:
        """From the sums of layer - 1 to the router of `layer`; see Decoder.attend. rows: see FusedDecoder.attend."""
        sums = self.sums if layer else None
        if rows is None:
            return self._decoder.attend(self._state, layer, sums)
        assert isinstance(self._decoder, FusedDecoder)
        return self._decoder.attend(self._state, layer, sums, rows)

    def graphs(self, rows_of: Sequence[WireRows]) -> None:
        """See Source.graphs: there are none."""

    def prepared(self, routed: Routed) -> list[list[Call]]:
        """See HostDecoder.prepared; nothing for other decoders."""
        prepare = getattr(self._decoder, "prepared", None)
        return [] if prepare is None else prepare(self._state, routed, self.sums)

    def is_at(self, layer: int) -> None:
        """Prepared calls have attended this layer last."""
        self._state.layer = layer

    def run_shared(self) -> None:
        """The shared experts of the layer attended last, if it has any; see Decoder.run_shared."""
        self._decoder.run_shared(self._state)

    def finish(self) -> torch.Tensor:
        """Logits of the pieces that end their sequences; see Decoder.finish."""
        return self._decoder.finish(self._state, self.sums)


class _Bucket:
    """One graph per MoE layer over the first `num_rows` rows of a slot's tensors, and one for its shared experts."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.attend: list[torch.cuda.CUDAGraph] = []
        self.shared: list[torch.cuda.CUDAGraph | None] = []

    @cached_property
    def handles(self) -> tuple[tuple[int, int], ...]:
        """Per layer: of the graph of `attend`, and of `shared` (0: none), as CUDA takes them."""
        return tuple(
            (attend.raw_cuda_graph_exec(), shared.raw_cuda_graph_exec() if shared is not None else 0)
            for attend, shared in zip(self.attend, self.shared, strict=True)
        )


class AttendGraphs:
    """The captured attention of one decoder in one slot."""

    def __init__(
        self, decoder: Decoder, results_dtype: torch.dtype, num_rows: int, keys: StepKeys | None = None
    ) -> None:
        """Capture for microbatches of up to `num_rows` (one of GRAPH_ROWS) tokens, on the current stream, which must
        not be the default one. keys: shared by the slots of a step, if cut sequences are to be served.

        For set-up: allocates, and takes about 5 ms per layer and bucket.
        """
        # No MemPool: one that ends, perhaps as garbage, waits for all streams and holds the GIL (docs/limits.md).
        self._decoder, self._keys, self._pool = decoder, keys, torch.cuda.graph_pool_handle()
        state = self._padding(num_rows)
        self._hidden, self._rope = state.hidden.clone(), tuple(r.clone() for r in state.rope)

        def zeros(*shape: int, dtype: torch.dtype = decoder.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        shape = decoder.shape
        self._sums = zeros(num_rows, shape.hidden, dtype=results_dtype)
        self._query_offsets = zeros(MAX_PIECES + 1, dtype=torch.int32)
        if keys is not None:
            self._key_offsets, self._key_lengths = (
                zeros(MAX_PIECES + 1, dtype=torch.int32),
                zeros(MAX_PIECES, dtype=torch.int32),
            )
            self._key_rows = torch.full((num_rows,), keys.padding_row, dtype=torch.long, device=decoder.device)
        top_k = num_rows, shape.top_k
        self._routed: Routed
        self._places: list[_Place] = []
        if isinstance(decoder, FusedDecoder):
            self._own_rows = decoder.wire.rows(zeros(num_rows, decoder.wire.row_bytes, dtype=torch.uint8))
            self._places = [_Place(decoder) for _ in range(NUM_PLACES)]
            self._routed = self._own_rows.hidden, self._own_rows.ids, self._own_rows.weights
        else:
            self._routed = (
                zeros(num_rows, shape.hidden),
                zeros(*top_k, dtype=torch.int32),
                zeros(*top_k, dtype=torch.float32),
            )
        adds_shared = decoder.has_shared_experts and not decoder.writes_rows
        self._shared = zeros(1, num_rows, shape.hidden) if adds_shared else None
        with collection_held():
            # The largest first: the others find memory for theirs.
            all_rows = [rows for rows in GRAPH_ROWS if rows <= num_rows]
            self._buckets = [self._capture(rows) for rows in reversed(all_rows)][::-1]
        torch.cuda.current_stream().synchronize()

    def _padding(self, num_rows: int) -> MicrobatchState:
        tokens = torch.zeros(num_rows, dtype=torch.long, device="cpu")
        step = self._decoder.new_step() if self._keys is None else self._keys.step([0])
        return self._decoder.start(step, tokens, [Piece(0, 0, num_rows, num_rows)])

    def _attend(self, state: MicrobatchState, layer: int, sums: torch.Tensor) -> None:
        y, num_rows = sums if layer else None, len(sums)
        if isinstance(self._decoder, FusedDecoder):
            self._decoder.attend(state, layer, y, self._places[layer % NUM_PLACES].rows)
            return
        for mine, theirs in zip(self._routed, self._decoder.attend(state, layer, y)):
            mine[:num_rows].copy_(theirs)  # so that the graphs' own memory is used again

    def _place_keys(self, state: MicrobatchState, num_rows: int) -> None:
        """Let a state's attention find keys by this object's tensors."""
        packing = state.packing
        packing.query_offsets = packing.key_offsets = self._query_offsets
        if self._keys is not None:
            state.cache = KeysOfMicrobatch(self._keys, self._key_rows[:num_rows])
            packing.key_offsets, packing.key_lengths, packing.max_key = (
                self._key_offsets,
                self._key_lengths,
                self._keys.longest,
            )

    def _capture(self, num_rows: int) -> _Bucket:
        decoder, sums = self._decoder, self._sums[:num_rows]
        bucket = _Bucket(num_rows)
        state = self._padding(num_rows)
        state.hidden, state.rope = self._hidden[:, :num_rows], tuple(r[:, :num_rows] for r in self._rope)
        self._place_keys(state, num_rows)
        for layer in range(min(2, decoder.shape.num_layers)):  # libraries set themselves up outside a capture
            self._attend(state, layer, sums)
        state.layer, state.moe_input = -1, None  # as Decoder.start leaves them
        for layer in range(decoder.shape.num_layers):
            with self._capturing(bucket.attend):
                self._attend(state, layer, sums)
            if state.moe_input is None:
                bucket.shared.append(None)
                continue
            with self._capturing(bucket.shared):
                decoder.run_shared(state)
                if self._shared is not None:
                    self._shared[:, :num_rows].copy_(state.shared)
            if self._shared is not None:
                state.shared = self._shared[:, :num_rows]
        return bucket

    @contextmanager
    def _capturing(self, graphs: list) -> Iterator[None]:
        """Not torch.cuda.graph, which gives back all memory that torch holds, also that reserved for the lanes."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
        graph.replay()  # the first launch uploads it
        graphs.append(graph)

    def start(self, state: MicrobatchState) -> GraphedMicrobatch | None:
        """The microbatch that Decoder.start has begun, if there is a graph for it."""
        packing, num_tokens = state.packing, state.packing.num_tokens
        whole = all(piece.start == 0 and piece.stop == piece.length for piece in packing.pieces)
        bucket = next((b for b in self._buckets if num_tokens <= b.num_rows), None)
        cuts = self._keys is not None and self._decoder.caches_keys
        if bucket is None or not (whole or cuts) or len(packing.pieces) > MAX_PIECES:
            return None
        self._hidden[:, :num_tokens].copy_(state.hidden)
        for mine, theirs in zip(self._rope, state.rope):
            mine[:, :num_tokens].copy_(theirs)
        self._take_pieces(packing)
        state.hidden = self._hidden[:, :num_tokens]
        shared = self._shared if bucket.shared[-1] is not None else None  # already in the sum if it is fused
        state.shared = None if shared is None else shared[:, :num_tokens]  # what `finish` adds
        hidden, ids, weights = (t[:num_tokens] for t in self._routed)
        rows = self._own_rows[:num_tokens] if self._places else None
        return GraphedMicrobatch(
            self._decoder, state, bucket, (hidden, ids, weights), self._sums[:num_tokens], self._places, rows
        )

    def _take_pieces(self, packing: Packing) -> None:
        """Copy where pieces and keys lie. Behind the last piece stand pieces without tokens."""
        num_pieces = len(packing.pieces)
        self._query_offsets.fill_(packing.num_tokens)
        self._query_offsets[: num_pieces + 1].copy_(packing.query_offsets)
        if self._keys is not None:
            assert packing.key_lengths is not None and packing.key_rows is not None  # made for a step of these keys
            self._key_offsets.fill_(self._keys.padding_row)
            self._key_offsets[: num_pieces + 1].copy_(packing.key_offsets)
            self._key_lengths.zero_()
            self._key_lengths[:num_pieces].copy_(packing.key_lengths)
            self._key_rows.fill_(self._keys.padding_row)
            self._key_rows[: packing.num_tokens].copy_(packing.key_rows)


class GraphedMicrobatch:
    """EagerMicrobatch with one graph launch per layer."""

    def __init__(
        self,
        decoder: Decoder,
        state: MicrobatchState,
        bucket: _Bucket,
        routed: Routed,
        sums: torch.Tensor,
        places: Sequence[_Place] = (),
        own_rows: WireRows | None = None,
    ) -> None:
        """places, own_rows: of graphs that write wire rows, where they read the rows' place, and where rows go that the
        caller has none for.
        """
        self._decoder, self._state, self._bucket, self._routed, self.sums = decoder, state, bucket, routed, sums
        self._places, self._own_rows = places, own_rows
        self._layer = -1  # attended last

    def graphs(self, rows_of: Sequence[WireRows]) -> tuple[tuple[int, int], ...] | None:
        """See Source.graphs; from now on their rows go where they should."""
        if rows_of and NUM_PLACES % len(rows_of):
            return None  # a layer's place would have to move each time
        for layer, place in enumerate(self._places):
            assert self._own_rows is not None
            place.point_to(rows_of[layer % len(rows_of)] if rows_of else self._own_rows)
        return self._bucket.handles

    def prepared(self, routed: Routed) -> list[list[Call]]:
        """See EagerMicrobatch: there are none."""
        return []

    def is_at(self, layer: int) -> None:
        pass

    def attend(self, layer: int, rows: WireRows | None = None) -> Routed:
        if self._own_rows is not None:
            self._places[layer % NUM_PLACES].point_to(self._own_rows if rows is None else rows)
        self._bucket.attend[layer].replay()
        self._layer = layer
        return self._routed

    def run_shared(self) -> None:
        """To be called after each attend: the next one's graph adds what this one's gives."""
        graph = self._bucket.shared[self._layer]
        if graph is not None:
            graph.replay()

    def finish(self) -> torch.Tensor:
        self._state.layer = self._decoder.shape.num_layers - 1
        return self._decoder.finish(self._state, self.sums)


def start_microbatch(
    decoder: Decoder,
    graphs: AttendGraphs | None,
    step: StepCache | StepOfKeys,
    token_ids: torch.Tensor,
    pieces: Sequence[Piece],
    results_dtype: torch.dtype,
) -> EagerMicrobatch | GraphedMicrobatch:
    """Embed a microbatch (see Decoder.start), with graphs if they serve. step: with StepKeys, those of the graphs."""
    state = decoder.start(step, token_ids, pieces)
    graphed = graphs.start(state) if graphs is not None else None
    return graphed or EagerMicrobatch(decoder, state, results_dtype)
