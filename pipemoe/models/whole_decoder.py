"""A decoder of any family: transformers' own forward, stopped at its routed experts (cut_forward.py).

Sequences are whole here: attention, linear attention and state layers see them as transformers would. Those of similar
length form a batch, padded at the end, where causality keeps padding from being seen:

    sequences of a microbatch   | 90 | 84 | 7 |      batches   [2, 90] (6 rows of padding), [1, 7]
    rows to the experts         90 + 84 + 7          padding is never dispatched

It has the methods of Decoder, and its rules for streams and threads.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.errors import InputError
from pipemoe.models.cache import StepCache
from pipemoe.models.config import fingerprint_of
from pipemoe.models.cut_forward import CutForward, Routed, Threads, stop_at_experts
from pipemoe.models.packing import Packing, Piece
from pipemoe.plan.schedule import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pipemoe.models.experts_form import ExpertsSite

_MOST_PADDING = 0.125  # of a batch's rows
_MOST_SEQUENCES = 32  # of a batch, whose ends' logits are computed for all its sequences


def _stop(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return stop_at_experts(x, ids, weights).to(x.dtype)


class _Batch:
    """Sequences that one forward takes."""

    def __init__(self, forward: CutForward, rows: torch.Tensor, places: torch.Tensor | None, ends: list[int]) -> None:
        self.forward = forward
        self.rows = rows  # [n] int64: where its tokens are in the microbatch
        self.places = places  # [n] int64: where they are in the batch's rows; None: there is no padding
        self.ends = ends  # of each sequence, the place of its last token among the logits' positions
        self.num_rows = 0  # of the batch, with padding

    def resume(self, y: torch.Tensor | None) -> Routed | None:
        """y [n, H], of the last experts, or None. Returns the next ones' rows [n, ...]."""
        if y is not None and self.places is not None:
            padded = y.new_zeros(self.num_rows, y.shape[1])
            y = padded.index_copy_(0, self.places, y)
        routed = self.forward.resume(y)
        if routed is None:
            return None
        self.num_rows = len(routed[0])
        if self.places is None:
            return routed
        x, ids, weights = (t.index_select(0, self.places) for t in routed)
        return x, ids, weights


class WholeState:
    """One microbatch on its way through the layers; used by one lane at a time."""

    def __init__(self, packing: Packing, batches: list[_Batch]) -> None:
        self.packing, self.batches = packing, batches
        self.layer = -1  # the MoE layer attended last


class WholeDecoder:
    """A model without its routed experts, on one device. Made by pipemoe.models.loading.load_decoder."""

    attention_form = None
    writes_rows = keys_in_places = False
    has_shared_experts = False  # none that can be computed apart
    can_be_captured = False
    caches_keys = False
    takes_whole_sequences = True
    cost_is_unknown = True

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[ExpertsSite],
        *,
        device: torch.device,
        dtype: torch.dtype,
        facts: dict[str, str],
        equal_lengths: bool = False,
    ) -> None:
        """equal_lengths: a batch's sequences must be equally long, since rotary embeddings depend on the longest."""
        self.config, self.device, self.dtype = model.config, device, dtype
        self.family: str = model.config.model_type
        self.facts, self.fingerprint = facts, fingerprint_of(facts)
        self._embedding: Any = model.get_input_embeddings()
        self._head: Any = model.get_output_embeddings()
        self.vocab_size: int = self._embedding.num_embeddings
        first = sites[0]
        most = max(site.intermediate for site in sites)
        self.shape = ModelShape(first.hidden, most, first.num_experts, first.top_k, len(sites))
        for site in sites:
            site.replace_forward(_stop)
        self._model, self._threads = model, Threads()
        self._most_padding = 0.0 if equal_lengths else _MOST_PADDING
        self._one_begins: Any = threading.Lock() if equal_lengths else nullcontext()  # it changes the rotary tables
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held here (the routed experts are not)."""
        return sum({t.data_ptr(): t.nbytes for t in self._model.parameters()}.values())

    @property
    def dense_weights(self) -> int:
        """Values that multiply each token per MoE layer, about: all but embedding and output projection."""
        outside = {id(m.weight): m.weight.numel() for m in (self._embedding, self._head) if m is not None}
        return (sum(p.numel() for p in self._model.parameters()) - sum(outside.values())) // self.shape.num_layers

    def kept_bytes_per_token(self) -> int:
        """No sequence is cut, so nothing is kept for its later parts."""
        return 0

    def lone_step(self, num_tokens: int) -> StepCache:
        """As Decoder has it."""
        return self.new_step()

    def new_step(self) -> StepCache:
        """As Decoder has it; it stays empty."""
        return StepCache()

    @torch.no_grad()
    def start(self, step: StepCache, token_ids: torch.Tensor, pieces: Sequence[Piece]) -> WholeState:
        """Make the batches of one microbatch: token_ids [T_mb] int64 on the host, whole sequences one after the other.

        Raises InputError for a part of a sequence, or an id outside of the vocabulary.
        """
        packing = Packing(token_ids, pieces, self.vocab_size, self.device)
        for piece in packing.pieces:
            if piece.start or piece.stop != piece.length:
                raise InputError(
                    f"{self.family} models take whole sequences, but a microbatch has tokens {piece.start} to "
                    f"{piece.stop} of {piece.length}; use Config(whole_sequences=True)"
                )
        return WholeState(packing, [self._batch(packing, group) for group in self._groups(packing.pieces)])

    def _groups(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Which sequences, by their place among `pieces`, share a batch."""
        groups: list[list[int]] = []
        for i in sorted(range(len(pieces)), key=lambda i: -pieces[i].length):
            if groups and len(groups[-1]) < _MOST_SEQUENCES:
                rows = (len(groups[-1]) + 1) * pieces[groups[-1][0]].length
                tokens = sum(pieces[j].length for j in groups[-1]) + pieces[i].length
                if rows - tokens <= self._most_padding * rows:
                    groups[-1].append(i)
                    continue
            groups.append([i])
        return groups

    def _batch(self, packing: Packing, group: list[int]) -> _Batch:
        lengths = [packing.pieces[i].length for i in group]
        longest, ends = max(lengths), sorted({length - 1 for length in lengths})
        rows = torch.cat([torch.arange(packing.spans[i].query_start, packing.spans[i].query_stop) for i in group])
        places = None
        if min(lengths) < longest:
            parts = [torch.arange(k * longest, k * longest + length) for k, length in enumerate(lengths)]
            places = torch.cat(parts).to(self.device)
        rows = rows.to(self.device)
        ids = torch.zeros(len(group) * longest, dtype=torch.long, device=self.device)
        taken = packing.token_ids.index_select(0, rows).long()
        ids = taken if places is None else ids.index_copy_(0, places, taken)
        options: dict[str, Any] = {"use_cache": False}
        if self._keeps_logits:
            options["logits_to_keep"] = torch.tensor(ends, device=self.device)
        else:
            ends = list(range(longest))
        forward = CutForward(lambda: self._model(ids.view(len(group), longest), **options).logits, self._threads)
        return _Batch(forward, rows, places, [ends.index(length - 1) for length in lengths])

    @torch.no_grad()
    def attend(
        self, state: WholeState, layer: int, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the routed experts' result of MoE layer `layer - 1` to the router of `layer`; see Decoder.attend."""
        self._check(state, layer, y)
        state.layer = layer
        with self._one_begins if layer == 0 else nullcontext():
            parts = [batch.resume(None if y is None else y.index_select(0, batch.rows)) for batch in state.batches]
        shape, num_tokens = self.shape, state.packing.num_tokens
        if not parts:
            x = torch.empty(0, shape.hidden, dtype=self.dtype, device=self.device)
            ids = torch.empty(0, shape.top_k, dtype=torch.int32, device=self.device)
            return x, ids, ids.float()
        outs = []
        for k, dtype in enumerate((self.dtype, torch.int32, torch.float32)):
            found = [part[k].to(dtype) for part in parts if part is not None]
            if len(found) != len(parts):
                raise InputError(f"{self.family}: a forward has only {layer} layers with routed experts")
            whole = torch.empty(num_tokens, found[0].shape[1], dtype=dtype, device=self.device)
            for batch, values in zip(state.batches, found, strict=True):
                whole.index_copy_(0, batch.rows, values)
            outs.append(whole)
        return outs[0], outs[1], outs[2]

    def run_shared(self, state: WholeState) -> None:
        """Shared experts are part of the forward."""

    @torch.no_grad()
    def finish(self, state: WholeState, y: torch.Tensor) -> torch.Tensor:
        """From the last MoE layer's result y [T_mb, H] to logits [sequences, V] float32, in the pieces' order."""
        self._check(state, self.shape.num_layers, y)
        state.layer = self.shape.num_layers
        logits, order = [], []
        for batch, group in zip(state.batches, self._groups(state.packing.pieces), strict=True):
            if batch.resume(y.index_select(0, batch.rows)) is not None:
                raise InputError(f"{self.family}: a forward calls its experts more than {state.layer} times")
            kept = batch.forward.result  # [sequences, positions, V]
            logits += [kept[k, end].float() for k, end in enumerate(batch.ends)]
            order += group
        return torch.stack([logits[order.index(i)] for i in range(len(order))])

    def _check(self, state: WholeState, layer: int, y: torch.Tensor | None) -> None:
        if state.layer != layer - 1 or (y is None) != (layer == 0):
            raise InputError(
                f"MoE layer {layer} of {self.shape.num_layers} was asked for after layer {state.layer}; layers run in "
                "order, each but the first with the result of the one before"
            )
