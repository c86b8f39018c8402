"""A microbatch on its way through a decoder: attention launched kernel by kernel, or for few tokens as CUDA graphs.

Launching the some fifty kernels of a layer's attention takes the host about a millisecond; for a short prompt the GPU is done
with them in a tenth of that. Graphs are captured at set-up, one per MoE layer and bucket of token counts:

    tokens of the microbatch    |  7 tokens | 9 rows of padding |     bucket of 16: the graph always computes 16 rows
    rows handed on              |  7 tokens |                         padding is never dispatched

A slot holds one microbatch at a time, so all graphs of a slot share their inputs, outputs and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from pipemoe.models.cache import StepCache
from pipemoe.models.decoder import Decoder, MicrobatchState
from pipemoe.models.packing import Piece
from pipemoe.plan.cost import GRAPH_ROWS

MAX_PIECES = 16  # sequences in one graph

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [n, H], ids [n, K], weights [n, K]


class EagerMicrobatch:
    """Any pieces, launched kernel by kernel. `sums` [T_mb, H]: where the routed experts' results of a layer belong."""

    def __init__(self, decoder: Decoder, state: MicrobatchState, results_dtype: torch.dtype) -> None:
        self._decoder, self._state = decoder, state
        self.sums = torch.zeros((state.packing.num_tokens, decoder.shape.hidden), dtype=results_dtype, device=decoder.device)

    def attend(self, layer: int) -> Routed:
        """From the sums of layer - 1 to the router of `layer`; see Decoder.attend."""
        return self._decoder.attend(self._state, layer, self.sums if layer else None)

    def run_shared(self) -> None:
        """The shared experts of the layer attended last, if it has any; see Decoder.run_shared."""
        self._decoder.run_shared(self._state)

    def finish(self) -> torch.Tensor:
        """Logits of the pieces that end their sequences; see Decoder.finish."""
        return self._decoder.finish(self._state, self.sums)


class _Bucket:
    """One graph per MoE layer over the first `num_rows` rows of a slot's tensors, and one for its shared experts if it has any."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.attend: list[torch.cuda.CUDAGraph] = []
        self.shared: list[torch.cuda.CUDAGraph | None] = []


class AttendGraphs:
    """The captured attention of one decoder in one slot."""

    def __init__(self, decoder: Decoder, results_dtype: torch.dtype, max_tokens: int) -> None:
        """Capture for microbatches of up to `max_tokens` tokens on the current stream, which must not be the default one.

        Set-up work: allocates, and needs about 5 ms per layer and bucket.
        """
        self._decoder, self._pool = decoder, torch.cuda.graph_pool_handle()
        largest = next((b for b in GRAPH_ROWS if b >= max_tokens), GRAPH_ROWS[-1])
        state = self._padding(largest)
        self._hidden, self._rope = state.hidden.clone(), tuple(r.clone() for r in state.rope)

        def zeros(*shape: int, dtype: torch.dtype = decoder.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=decoder.device)

        shape = decoder.shape
        self._sums = zeros(largest, shape.hidden, dtype=results_dtype)
        self._offsets = zeros(MAX_PIECES + 1, dtype=torch.int32)
        top_k = largest, shape.top_k
        self._routed = zeros(largest, shape.hidden), zeros(*top_k, dtype=torch.int32), zeros(*top_k, dtype=torch.float32)
        self._shared = zeros(1, largest, shape.hidden) if decoder.has_shared_experts else None
        self._buckets = [self._capture(num_rows) for num_rows in GRAPH_ROWS if num_rows <= largest]
        torch.cuda.current_stream().synchronize()

    def _padding(self, num_rows: int) -> MicrobatchState:
        tokens = torch.zeros(num_rows, dtype=torch.long)
        return self._decoder.start(self._decoder.new_step(), tokens, [Piece(0, 0, num_rows, num_rows)])

    def _capture(self, num_rows: int) -> _Bucket:
        decoder, sums = self._decoder, self._sums[:num_rows]
        bucket = _Bucket(num_rows)
        state = self._padding(num_rows)
        state.hidden, state.rope = self._hidden[:, :num_rows], tuple(r[:, :num_rows] for r in self._rope)
        state.packing.query_offsets = state.packing.key_offsets = self._offsets
        for layer in range(min(2, decoder.shape.num_layers)):  # libraries set themselves up outside a capture
            decoder.attend(state, layer, sums if layer else None)
        state.layer, state.moe_input = -1, None  # as Decoder.start leaves them
        for layer in range(decoder.shape.num_layers):
            with self._capturing(bucket.attend):
                routed = decoder.attend(state, layer, sums if layer else None)
                for mine, theirs in zip(self._routed, routed):  # copies, so that the graphs' own memory is used again
                    mine[:num_rows].copy_(theirs)
            if state.moe_input is None:
                bucket.shared.append(None)
                continue
            with self._capturing(bucket.shared):
                decoder.run_shared(state)
                self._shared[:, :num_rows].copy_(state.shared)
            state.shared = self._shared[:, :num_rows]
        return bucket

    @contextmanager
    def _capturing(self, graphs: list) -> Iterator[None]:
        """Not torch.cuda.graph: that gives back all memory that torch holds, also what is reserved for the lanes."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
        graph.replay()  # the first launch uploads it
        graphs.append(graph)

    def start(self, state: MicrobatchState) -> GraphedMicrobatch | None:
        """The microbatch that Decoder.start has begun, if there is a graph for it: few tokens of whole sequences."""
        packing = state.packing
        whole = all(piece.start == 0 and piece.stop == piece.length for piece in packing.pieces)
        bucket = next((b for b in self._buckets if packing.num_tokens <= b.num_rows), None)
        if bucket is None or not whole or len(packing.pieces) > MAX_PIECES:
            return None
        num_tokens, num_offsets = packing.num_tokens, len(packing.pieces) + 1
        self._hidden[:, :num_tokens].copy_(state.hidden)
        for mine, theirs in zip(self._rope, state.rope):
            mine[:, :num_tokens].copy_(theirs)
        self._offsets.fill_(num_tokens)  # what lies behind the last piece are pieces without tokens
        self._offsets[:num_offsets].copy_(packing.query_offsets)
        state.hidden = self._hidden[:, :num_tokens]
        state.shared = None if bucket.shared[-1] is None else self._shared[:, :num_tokens]  # what `finish` adds
        routed = tuple(t[:num_tokens] for t in self._routed)
        return GraphedMicrobatch(self._decoder, state, bucket, routed, self._sums[:num_tokens])


class GraphedMicrobatch:
    """Few tokens of whole sequences, one graph launch per layer. As EagerMicrobatch."""

    def __init__(self, decoder: Decoder, state: MicrobatchState, bucket: _Bucket, routed: Routed, sums: torch.Tensor) -> None:
        self._decoder, self._state, self._bucket, self._routed, self.sums = decoder, state, bucket, routed, sums
        self._layer = -1  # attended last

    def attend(self, layer: int) -> Routed:
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
    step_cache: StepCache,
    token_ids: torch.Tensor,
    pieces: Sequence[Piece],
    results_dtype: torch.dtype,
) -> EagerMicrobatch | GraphedMicrobatch:
    """Embed a microbatch (see Decoder.start) and take the graphs for it if they serve."""
    state = decoder.start(step_cache, token_ids, pieces)
    graphed = graphs.start(state) if graphs is not None else None
    return graphed or EagerMicrobatch(decoder, state, results_dtype)
