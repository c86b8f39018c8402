"""A decoder on the host whose attention is two calls of compiled code a layer (see host_attention), of the weights of
another's modules. transformers' modules take some fifty calls of torch, each longer than the arithmetic of a short
prompt, and hold the GIL meanwhile.

Keys and values lie in the microbatch's own rows of heads; those of cut sequences are copied to the StepCache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipemoe.addresses import Arguments, Call
from pipemoe.experts.sgemm import sgemm_address
from pipemoe.models import host_attention
from pipemoe.models.cache import StepCache
from pipemoe.models.decoder import Decoder, MicrobatchState
from pipemoe.models.fused_attention import eps_of
from pipemoe.models.host_routing import compile_route, prepared_route
from pipemoe.models.packing import Piece
from pipemoe.models.products import fuse
from pipemoe.models.routing import route

if TYPE_CHECKING:
    from pipemoe.models.attention_form import AttentionForm
    from pipemoe.models.step_keys import StepOfKeys

_ALL_TOKENS = 1 << 62  # a window that hides none


def lack_on_host(decoder: Decoder) -> str | None:
    """Why a decoder's attention cannot run as compiled code on the host, in words; None if it can."""
    form = decoder.attention_form
    if form is None:
        return f"family {decoder.family} does not state what its attention is made of"
    if decoder.dtype != torch.float32:
        return f"on the host it computes in float32, not in {decoder.dtype}"
    if not decoder.plain_rms_norm:
        return f"family {decoder.family} has norms that are not plain RMSNorm"
    if form.latent is not None or form.interleaved:
        return "on the host it knows neither latents nor interleaved rotary embeddings"
    if not sgemm_address():
        return "torch's library shows no sgemm"
    return None


class _Layer:
    """What the compiled calls read of a decoder layer, as NumPy arrays of the modules' weights."""

    def __init__(self, form: AttentionForm, block: Any) -> None:
        attention = block.self_attn
        weight, bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
        self.norm_in, self.eps_in = _array(block.input_layernorm.weight), np.float32(eps_of(block.input_layernorm))
        self.norm_out = _array(block.post_attention_layernorm.weight)
        self.eps_out = np.float32(eps_of(block.post_attention_layernorm))
        self.weight, self.bias = _array(weight), _array(bias)
        self.out, self.out_bias = _array(attention.o_proj.weight), _array(attention.o_proj.bias)
        self.scaling = np.float32(attention.scaling)
        norms = (attention.q_norm, attention.k_norm) if form.head_norms else ()
        self.head_norms = [_array(norm.weight) for norm in norms] or [_array(None)] * 2
        self.head_eps = np.float32(eps_of(norms[0]) if norms else 0)

    def arguments(self, form: AttentionForm, gate: np.ndarray) -> Arguments:
        """As host_attention.attend_layer reads them."""
        return Arguments(
            host_attention.LAYER,
            num_query=form.num_query,
            num_key=form.num_key,
            rotary=form.rotary,
            window=form.window or _ALL_TOKENS,
            sgemm=sgemm_address(),
            eps_in=float(self.eps_in),
            head_eps=float(self.head_eps),
            scaling=float(self.scaling),
            eps_out=float(self.eps_out),
            norm_in=self.norm_in,
            weight=self.weight,
            bias=self.bias,
            q_norm=self.head_norms[0],
            k_norm=self.head_norms[1],
            out=self.out,
            out_bias=self.out_bias,
            norm_out=self.norm_out,
            gate=gate,
        )


def _array(tensor: torch.Tensor | None) -> np.ndarray:
    """[0] for None. Shares memory."""
    return np.empty(0, np.float32) if tensor is None else tensor.detach().contiguous().numpy()


class _HostState(MicrobatchState):
    """A microbatch's state, and the memory that its layers share."""

    __slots__ = ("arrays", "cos", "cut", "heads", "pieces", "room", "sin", "step", "x")

    def __init__(self, state: MicrobatchState, step: StepCache, form: AttentionForm) -> None:
        super().__init__(state.packing, state.cache, state.hidden, state.rope)
        packing, width = state.packing, (form.num_query + 2 * form.num_key) * form.head_dim
        self.step, num_tokens = step, packing.num_tokens
        self.heads, self.x = np.empty((num_tokens, width), np.float32), np.empty_like(state.hidden[0].numpy())
        self.cos, self.sin = (t[0].contiguous().numpy() for t in state.rope)
        self.room = np.empty(min(host_attention.QUERY_ROWS, packing.max_query) * packing.max_key, np.float32)
        self.cut = [p.start > 0 or p.stop < p.length for p in packing.pieces]
        keys = self.heads.ctypes.data + 4 * form.num_query * form.head_dim
        values, rows = keys + 4 * form.num_key * form.head_dim, []
        for span in packing.spans:
            at = 4 * width * span.query_start
            rows.append((span.query_start, span.query_stop, 0, keys + at, values + at, width))
        self.pieces = np.array(rows, np.int64).reshape(-1, 6)


class HostDecoder(Decoder):
    """See the module."""

    cost_is_unknown = False

    def __init__(self, plain: Decoder) -> None:
        """plain: a decoder for which there is no lack_on_host. Its modules are shared: what was three matrices becomes
        parts of one.
        """
        vars(self).update(vars(plain))
        lack = lack_on_host(plain)
        assert lack is None and self.attention_form is not None, lack
        self._form: AttentionForm = self.attention_form
        self._layers = {id(block): _Layer(self._form, block) for block in self._model.layers}
        self._indices = {id(block): i for i, block in enumerate(self._model.layers)}
        self._gates = [_array(weight) for weight in self._gate_weights]
        self._no_gate = np.empty((0, self.shape.hidden), np.float32)
        host_attention.project_rows.compile()
        host_attention.attend_rows.compile()
        host_attention.attend_layer.compile()
        compile_route(self.routing)
        self._arguments = [
            self._layers[id(block)].arguments(self._form, gate) for block, gate in zip(self._blocks, self._gates)
        ]

    def key_sizes(self) -> list[tuple[int, int]]:
        return [(self._form.num_key, self._form.head_dim)] * 2

    @torch.no_grad()
    def start(self, step: StepCache | StepOfKeys, token_ids: torch.Tensor, pieces: Sequence[Piece]) -> MicrobatchState:
        """As Decoder.start; step: a StepCache."""
        assert isinstance(step, StepCache)
        return _HostState(super().start(step, token_ids, pieces), step, self._form)

    @torch.no_grad()
    def attend(
        self, state: MicrobatchState, layer: int, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Decoder.attend. x is the state's, until the next layer's."""
        assert isinstance(state, _HostState)
        self._add_experts(state, layer, y)
        for block in self._dense[layer]:
            self._run_dense(state, block)
        logits = np.empty((state.packing.num_tokens, self.shape.num_experts), np.float32)
        self._attend(state, self._blocks[layer], self._gates[layer], logits)
        state.layer, rows = layer, torch.from_numpy(state.x)
        state.moe_input = rows.unsqueeze(0) if self._shared_experts[layer] is not None else None
        return rows, *route(torch.from_numpy(logits), self.routing, self._gate_biases[layer])

    def prepared(self, state: MicrobatchState, routed: Sequence[torch.Tensor], y: torch.Tensor) -> list[list[Call]]:
        """Calls of compiled code that do what `attend` does in each layer but the first; empty if there are none. Layer
        0 has been attended, and has given `routed`, which they write. y: see `attend`.
        """
        assert isinstance(state, _HostState)
        is_plain = not any(state.cut) and not self.has_shared_experts and not any(self._dense[1:-1])
        if not is_plain or y.dtype != torch.float32:
            return []
        x, ids, weights = routed
        logits = np.empty((len(ids), self.shape.num_experts), np.float32)
        of_state = Arguments(
            host_attention.STATE,
            hidden=state.hidden[0],
            x=x,
            heads=state.heads,
            cos=state.cos,
            sin=state.sin,
            pieces=state.pieces,
            room=state.room,
            sums=y,
            logits=logits,
        )
        calls: list[list[Call]] = [[]]
        for layer in range(1, len(self._blocks)):
            words = Arguments(host_attention.CALL, layer=self._arguments[layer].address, state=of_state.address)
            attend = words.of(host_attention.attend_layer)._replace(kept=(words, of_state, self))
            bias = self._gate_biases[layer]
            if bias is not None or layer == 1:
                choose = prepared_route(logits, self.routing, bias, ids.numpy(), weights.numpy())
            calls.append([attend, choose])
        return calls

    def _run_dense(self, state: MicrobatchState, block: Any) -> None:
        assert isinstance(state, _HostState)
        self._attend(state, block, self._no_gate, np.empty((0, 0), np.float32))
        state.hidden.add_(block.mlp(torch.from_numpy(state.x).unsqueeze(0)))

    def _attend(self, state: _HostState, block: Any, gate: np.ndarray, logits: np.ndarray) -> None:
        """A layer's attention, and the norm behind it: state.x; with a gate, the router's logits of that."""
        if not state.packing.num_tokens:
            return
        form, of, hidden = self._form, self._layers[id(block)], state.hidden[0].numpy()
        host_attention.project_rows(
            hidden, of.norm_in, of.eps_in, state.x, sgemm_address(), of.weight, of.bias,
            form.num_query, form.num_key, form.rotary, *of.head_norms, of.head_eps, state.cos, state.sin, state.heads,
        )  # fmt: skip
        pieces = state.pieces
        if any(state.cut):
            pieces, kept = self._with_earlier(state, self._indices[id(block)])
        host_attention.attend_rows(
            hidden, state.heads, pieces, form.num_query, form.num_key, of.scaling, form.window or _ALL_TOKENS,
            state.room, sgemm_address(), of.out, of.out_bias, of.norm_out, of.eps_out, state.x, gate, logits,
        )  # fmt: skip

    def _with_earlier(self, state: _HostState, layer: int) -> tuple[np.ndarray, list[torch.Tensor]]:
        """state.pieces with the keys and values of cut sequences so far, and the tensors that hold those. Keeps the
        pieces' own for later microbatches.
        """
        form, pieces, kept = self._form, state.pieces.copy(), []
        first, size = form.num_query * form.head_dim, form.num_key * form.head_dim
        for row, (piece, span) in enumerate(zip(state.packing.pieces, state.packing.spans, strict=True)):
            if not state.cut[row]:
                continue
            both = torch.from_numpy(state.heads[span.query_start : span.query_stop, first:])
            own = [
                part.unflatten(1, (form.num_key, -1)).clone() for part in both.split(size, dim=1)
            ]  # each [n, Hkv, D]
            earlier = state.step.earlier(layer, piece.sequence, piece.start)
            if piece.stop < piece.length:
                state.step.keep(layer, piece.sequence, *(part.transpose(0, 1).unsqueeze(0) for part in own))
            parts = [[kept_rows[0].transpose(0, 1) for kept_rows in pair] for pair in earlier] + [own]
            keys, values = (torch.cat(of_kind) for of_kind in zip(*parts, strict=True))
            kept += [keys, values]
            pieces[row, 2:] = piece.start, keys.data_ptr(), values.data_ptr(), size
        return pieces, kept
