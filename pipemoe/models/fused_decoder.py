"""A decoder whose layers are one kernel or one library call for each step, of the weights of another's modules.

    hidden += routed sums; norm       one kernel
    q, k, v                           one product with weights that lie one behind another
    norms of heads, rotary embedding, keys and values in their place       one kernel
    attention
    hidden += output                  one product that adds
    norm, as wire rows                one kernel
    router, top-k into wire rows      one product and one kernel

Nothing is copied or packed. Keys and values stay in StepKeys for as long as the step does. What this cannot do, `lack`
says; then transformers' modules run, as in decoder.py.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from pipemoe.models.decoder import Decoder, MicrobatchState
from pipemoe.models.first_tokens import first_tokens
from pipemoe.models.fused_attention import LatentAttention, attention_of, lack_of_kernels, norm_of, rotary_tables
from pipemoe.models.packed_attention import serves
from pipemoe.models.packing import Piece
from pipemoe.models.products import (
    add_library_product,
    counts_filled,
    fuse,
    library_product,
    missing_counts,
    product,
    row_counts,
    row_parts,
)
from pipemoe.models.routing import kernel_takes, route_into, route_into_placed
from pipemoe.models.step_keys import KeysOfMicrobatch, StepKeys, StepOfKeys
from pipemoe.wire import WireFormat, WireRows

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from pipemoe.models.cache import StepCache
    from pipemoe.models.packing import Packing
    from pipemoe_kernels.placed_rows import PlacedRows


def lack(decoder: Decoder) -> str | None:
    """Why the fused path cannot run a decoder, in words; None if it can."""
    form, device, dtype, hidden = decoder.attention_form, decoder.device, decoder.dtype, decoder.shape.hidden
    if form is None:
        return f"family {decoder.family} does not state what its attention is made of"
    if device.type != "cuda":
        return "it needs a GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 and float16, not in {dtype}"
    if not decoder.plain_rms_norm:
        return f"family {decoder.family} has norms that are not plain RMSNorm"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed"
    from pipemoe_kernels.attention.format import CAPABILITY, WIDTH
    from pipemoe_kernels.attention.norm import MAX_HIDDEN

    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"it needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer"
    if hidden % WIDTH or hidden > MAX_HIDDEN:
        return f"rows of {hidden} values are not whole vectors, or more than {MAX_HIDDEN}"
    if not kernel_takes(device, decoder.routing):
        return f"no kernel routes to {decoder.routing.top_k} of {decoder.routing.num_experts} experts"
    if not serves(device, dtype, form.head_dim):
        return f"heads of {form.head_dim} values do not fit the attention kernel"
    return lack_of_kernels(form)


ROPE_BY_LENGTH = ("dynamic", "longrope", "su")
_MOST_SEQUENCES = 64  # of a warm-up; more in one microbatch are rare


class _Mlp:
    """A dense SwiGLU layer, or the shared experts: its output is added to the residual."""

    def __init__(self, mlp: Any) -> None:
        self.width = mlp.gate_proj.weight.shape[0]
        self.gate_up, _ = fuse([mlp.gate_proj, mlp.up_proj])  # [2I, H]
        self.down, self._activation = mlp.down_proj.weight, mlp.act_fn

    def add_to(self, hidden: torch.Tensor, x: torch.Tensor) -> None:
        for part in row_parts(len(x)):
            gate, up = library_product(x[part], self.gate_up).split(self.width, dim=1)
            add_library_product(hidden[part], self._activation(gate).mul_(up), self.down)


class _Layer:
    """The parts of one decoder layer; moe: its number among the MoE layers, or None."""

    def __init__(self, decoder: Decoder, block: Any, index: int, moe: int | None) -> None:
        assert decoder.attention_form is not None  # see lack
        self.attention = attention_of(decoder.attention_form, block.self_attn, index)
        self.norm_in, self.norm_out = norm_of(block.input_layernorm), norm_of(block.post_attention_layernorm)
        self.mlp = _Mlp(block.mlp) if moe is None else None
        self.gate = None if moe is None else block.mlp.gate.weight  # [E, H]
        self.gate_bias = None if moe is None else decoder.gate_bias(moe)
        shared = getattr(block.mlp, "shared_experts", None)
        self.shared = None if shared is None else _Mlp(shared)


class FusedDecoder(Decoder):
    """See the module. `attend` may write its rows where the caller wants them."""

    writes_rows = True
    cost_is_unknown = False

    def __init__(self, plain: Decoder) -> None:
        """plain: a decoder for which there is no `lack`. Its modules are shared: what was three matrices becomes parts
        of one.
        """
        vars(self).update(vars(plain))
        assert lack(plain) is None, lack(plain)
        moe = {layer: number for number, layer in enumerate(self._moe_layers)}
        self._layers = [_Layer(plain, block, i, moe.get(i)) for i, block in enumerate(self._model.layers)]
        edges = [-1, *self._moe_layers, len(self._layers)]
        # For each MoE layer the decoder layers up to it, and the dense ones after the last.
        self._runs = [self._layers[a + 1 : b + 1] for a, b in zip(edges, edges[1:])]
        self._last_norm = norm_of(self._model.norm)
        self.wire = WireFormat(self.shape.hidden, self.shape.top_k, self.dtype)
        self._rope_of_positions: tuple[torch.Tensor, torch.Tensor] | None = None
        self._counts_run: dict[Hashable, int] = {}  # see counts_filled

    @property
    def keys_in_places(self) -> bool:
        return True

    def key_sizes(self) -> list[tuple[int, int]]:
        return self._layers[0].attention.key_sizes()

    def lone_step(self, num_tokens: int) -> StepOfKeys:
        last = self._moe_layers[min(1, len(self._moe_layers) - 1)]
        return StepKeys(self, num_tokens, last + 1).step([0])

    @torch.no_grad()
    def start(self, step: StepCache | StepOfKeys, token_ids: torch.Tensor, pieces: Sequence[Piece]) -> MicrobatchState:
        """As Decoder.start; step: of StepKeys."""
        state = super().start(step, token_ids, pieces)
        assert self.attention_form is not None
        if self.attention_form.latent is not None and not state.packing.starts_fresh:
            # Keys are made of the latents in this range alone.
            state.packing.key_offsets = state.packing.key_offsets - state.packing.key_range[0]
        return state

    @torch.no_grad()
    def warm_up(
        self, new_step: Callable[[Sequence[int]], StepCache | StepOfKeys], most_tokens: int, sums_dtype: torch.dtype
    ) -> None:
        """Run on the current stream, for every number of rows that a call may have, what steps run beside the experts.

        The driver loads a kernel when it is first launched, and waits for all that the GPU runs until it does: a step
        would wait for the other slot's. A library takes other kernels for other numbers of rows (see row_parts).
        new_step: see GraphStore.new_step. most_tokens: of a step. sums_dtype: of what comes back from the experts.
        """
        num_layers = self.shape.num_layers
        with counts_filled(self._counts_run):
            for count in row_counts(most_tokens):
                alone = [Piece(i, 0, 1, 1) for i in range(count)] if count <= _MOST_SEQUENCES else []
                for pieces in filter(None, (alone, [Piece(0, 0, count, count)])):
                    ids = torch.zeros(count, dtype=torch.long, device="cpu")
                    state, sums = self.start(new_step(range(len(pieces))), ids, pieces), None
                    for layer in range(min(2, num_layers)):  # the others run the same kernels
                        self.attend(state, layer, sums)
                        sums = torch.zeros((count, self.shape.hidden), dtype=sums_dtype, device=self.device)
                    state.layer = num_layers - 1
                    assert sums is not None
                    first_tokens(self.finish(state, sums))
        self.warm_up_keys(most_tokens)

    @torch.no_grad()
    def warm_up_keys(self, most: int) -> None:
        """Run on the current stream what depends on how many keys there are. most: of a round, with earlier chunks'."""
        self._positions(most)
        attention = self._layers[0].attention
        if isinstance(attention, LatentAttention):
            with counts_filled(self._counts_run):
                attention.warm_up_keys(most)

    @property
    def ends_with_experts(self) -> bool:
        """Is the last decoder layer a MoE layer?"""
        return not self._runs[-1]

    @property
    def rotates_by_position(self) -> bool:
        """Does a token's rotary embedding depend on its position alone, whatever the sequence's length?"""
        kind = getattr(self._model.rotary_emb, "rope_type", None)
        return isinstance(kind, str) and kind not in ROPE_BY_LENGTH

    @torch.no_grad()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] int64 on the device -> [1, T, H]."""
        hidden = self._model.embed_tokens(token_ids).unsqueeze(0)
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def _rope(self, hidden: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
        """As kernels read them: [1, T, n]. Looked up, since the module's own product takes another kernel for another
        number of tokens.
        """
        assert self.attention_form is not None
        if not self.rotates_by_position:
            return rotary_tables(self.attention_form, *super()._rope(hidden, packing))
        cos, sin = self._positions(packing.max_key)
        return cos.index_select(0, packing.positions)[None], sin.index_select(0, packing.positions)[None]

    def _positions(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`rope_table` of at least so many positions. Waits for the device if it has to grow: a warm-up sees to it that
        no step makes it.
        """
        if self._rope_of_positions is None or len(self._rope_of_positions[0]) < count:
            cos, sin = self.rope_table(1 << max(count - 1, 0).bit_length())
            if self.device.type == "cuda":
                with torch.cuda.stream(torch.cuda.Stream()):  # whose memory is not what is reserved for a lane
                    kept = torch.empty_like(cos), torch.empty_like(sin)
                cos, sin = kept[0].copy_(cos), kept[1].copy_(sin)
                torch.cuda.synchronize(self.device)  # other streams read them, and may still read the smaller ones
            self._rope_of_positions = cos, sin
        return self._rope_of_positions

    @torch.no_grad()
    def rope_table(self, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions from 0 on, as kernels read them: [num_positions, n] each."""
        assert self.attention_form is not None
        positions = torch.arange(num_positions, device=self.device).unsqueeze(0)
        like = torch.empty(1, dtype=self.dtype, device=self.device)
        cos, sin = rotary_tables(self.attention_form, *self._model.rotary_emb(like, positions))
        return cos[0].contiguous(), sin[0].contiguous()

    @torch.no_grad()
    def attend(
        self,
        state: MicrobatchState,
        layer: int,
        y: torch.Tensor | None,
        rows: WireRows | PlacedRows | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Decoder.attend. rows: where they go in wire format; x, ids and weights are then views of them. None makes
        room for them. PlacedRows: where these say when the kernels run; then only x is given back, and a copy.
        """
        self._check_order(state, layer, y)
        if y is not None:
            self.run_shared(state)
        state.layer = layer
        hidden = state.hidden[0]
        if rows is None:
            rows = self.wire.rows(hidden.new_empty((len(hidden), self.wire.row_bytes), dtype=torch.uint8))
        if len(hidden):
            x = self._run(state, self._runs[layer], y, rows)
            if self._shared_experts[layer] is not None:
                state.moe_input = x
        if isinstance(rows, WireRows):
            return rows.hidden, rows.ids, rows.weights
        return x, x, x

    def _run(
        self, state: MicrobatchState, layers: list[_Layer], sums: torch.Tensor | None, rows: WireRows | PlacedRows
    ) -> torch.Tensor:
        """All of these layers, to the router of the last one. Returns what its experts read."""
        for layer in layers[:-1]:
            self._dense_layer(state, layer, sums)
            sums = None
        last = layers[-1]
        self._attention(state, last, sums)
        return self._route(state.hidden[0], last, rows)

    def _attention(self, state: MicrobatchState, layer: _Layer, sums: torch.Tensor | None) -> None:
        hidden = state.hidden[0]
        normed = torch.empty_like(hidden)
        layer.norm_in(hidden, sums, normed)
        assert isinstance(state.cache, KeysOfMicrobatch)
        layer.attention.add_to(hidden, normed, state.rope, state.packing, state.cache)

    def _dense_layer(self, state: MicrobatchState, layer: _Layer, sums: torch.Tensor | None) -> None:
        assert layer.mlp is not None
        self._attention(state, layer, sums)
        hidden = state.hidden[0]
        x = torch.empty_like(hidden)
        layer.norm_out(hidden, None, x)
        layer.mlp.add_to(hidden, x)

    def _route(self, hidden: torch.Tensor, layer: _Layer, rows: WireRows | PlacedRows) -> torch.Tensor:
        assert layer.gate is not None
        if isinstance(rows, WireRows):
            x = rows.hidden
            layer.norm_out(hidden, None, x)
        else:
            x = torch.empty_like(hidden)  # the product must know its address
            layer.norm_out(hidden, None, x, rows)
        # Products of 16-bit values are exact in float32, so this is the float32 router up to the order of its sums.
        logits = product(x, layer.gate, None, torch.float32 if self.routing.logits_in_float32 else None)
        if isinstance(rows, WireRows):
            route_into(logits, self.routing, layer.gate_bias, rows.ids, rows.weights)
        else:
            route_into_placed(logits, self.routing, layer.gate_bias, rows, self.wire.weights_offset)
        return x

    @torch.no_grad()
    def run_shared(self, state: MicrobatchState) -> None:
        """As Decoder.run_shared; adds the output to the residual."""
        if state.moe_input is not None:
            shared = self._layers[self._moe_layers[state.layer]].shared
            assert shared is not None
            shared.add_to(state.hidden[0], state.moe_input)
            state.moe_input = None

    @torch.no_grad()
    def finish(self, state: MicrobatchState, y: torch.Tensor) -> torch.Tensor:
        """As Decoder.finish."""
        self._check_order(state, len(self._blocks), y)
        self.run_shared(state)
        state.layer = len(self._blocks)
        sums: torch.Tensor | None = y
        for layer in self._runs[-1] if state.packing.num_tokens else []:
            self._dense_layer(state, layer, sums)
            sums = None
        ends = state.hidden[0].index_select(0, state.packing.end_rows)
        of_ends = None if sums is None else sums.index_select(0, state.packing.end_rows)
        normed = torch.empty_like(ends)
        self._last_norm(ends, of_ends, normed)
        for count in missing_counts(normed, self._lm_head.weight):
            self._lm_head(normed[:count])
        parts = row_parts(len(normed), fine=_MOST_SEQUENCES, most=_MOST_SEQUENCES)
        logits = [self._lm_head(normed[part]) for part in parts]
        return (logits[0] if len(logits) == 1 else torch.cat(logits)).float()
