"""A decoder cut open at its MoE layers: attend(layer) runs to the router, finish() from the last experts to the logits.

    start -> attend(0) -> [experts 0] -> attend(1) -> [experts 1] -> ... -> attend(L-1) -> [experts L-1] -> finish

The routed experts are not here: the caller takes (x, ids, weights) to the ranks that hold them and brings the sums back
as `y`. Everything else is transformers' own modules, run unchanged on one microbatch, whose rows [1, T_mb, H] hold
several sequence pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from pipemoe.errors import InputError
from pipemoe.models import packed_attention
from pipemoe.models.cache import MicrobatchCache, StepCache
from pipemoe.models.config import fingerprint_of
from pipemoe.models.packing import Packing, Piece
from pipemoe.models.routing import route
from pipemoe.plan.schedule import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from pipemoe.models.families import Family
    from pipemoe.models.step_keys import KeysOfMicrobatch, StepOfKeys

__all__ = ["Decoder", "MicrobatchState", "Piece"]


class MicrobatchState:
    """One microbatch on its way through the layers; used by one lane at a time."""

    __slots__ = ("cache", "hidden", "layer", "moe_input", "packing", "rope", "shared")

    def __init__(
        self, packing: Packing, cache: MicrobatchCache | KeysOfMicrobatch, hidden: torch.Tensor, rope: tuple
    ) -> None:
        self.packing = packing
        self.cache = cache
        self.hidden = hidden  # [1, T_mb, H], the residual stream
        self.rope = rope  # cos, sin: [1, T_mb, D]
        self.layer = -1  # the MoE layer attended last
        self.moe_input: torch.Tensor | None = None  # [1, T_mb, H], kept only where a shared expert reads it
        self.shared: torch.Tensor | None = None  # [1, T_mb, H], the shared experts' output once computed


class Decoder:
    """A model without its routed experts, on one device.

    Made by pipemoe.models.loading.load_decoder. Methods run on the current torch stream (on the host: in the calling
    thread), never wait for the device, and may be called from any number of threads as long as each MicrobatchState
    stays with one of them at a time. Microbatches that hold pieces of one sequence must pass each layer in the order of
    the pieces.
    """

    writes_rows = False  # whether `attend` takes `rows`, see FusedDecoder
    takes_whole_sequences = False
    cost_is_unknown = True  # of attention, from the dimensions: transformers' modules run

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        *,
        device: torch.device,
        dtype: torch.dtype,
        facts: dict[str, str],
    ) -> None:
        """facts: what must be equal on all ranks, by name."""
        config = model.config
        self.config: PreTrainedConfig = config
        self.family: str = family.model_type
        self.device = device
        self.dtype = dtype
        self.facts, self.fingerprint = facts, fingerprint_of(facts)
        self.vocab_size: int = config.vocab_size
        self.routing = family.routing(config)
        self.attention_form, self.plain_rms_norm = family.attention(config), family.plain_rms_norm
        self._moe_layers = family.moe_layers(config)  # decoder layer of each MoE layer
        self.shape = ModelShape(
            hidden=config.hidden_size,
            intermediate=family.intermediate(config),
            num_experts=self.routing.num_experts,
            top_k=self.routing.top_k,
            num_layers=len(self._moe_layers),
        )
        self._model = model.model
        self._lm_head = model.lm_head
        self._blocks = [model.model.layers[i] for i in self._moe_layers]
        # The dense decoder layers before each MoE layer, and after the last one.
        edges = [-1, *self._moe_layers, config.num_hidden_layers]
        self._dense = [list(model.model.layers[a + 1 : b]) for a, b in zip(edges, edges[1:])]
        gates = [block.mlp.gate for block in self._blocks]
        gate_dtype = torch.float32 if self.routing.logits_in_float32 else dtype
        self._gate_weights = [gate.weight.detach().to(gate_dtype) for gate in gates]  # [E, H] per MoE layer
        self._gate_biases = [getattr(gate, "e_score_correction_bias", None) for gate in gates]  # [E] float32
        self._shared_experts: list[Any] = [getattr(block.mlp, "shared_experts", None) for block in self._blocks]

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights held here (the routed experts are not)."""
        tensors = [*self._model.parameters(), *self._lm_head.parameters()]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    @property
    def has_shared_experts(self) -> bool:
        return any(shared is not None for shared in self._shared_experts)

    @property
    def can_be_captured(self) -> bool:
        """Can `attend` run from a CUDA graph on other pieces than those of the capture?"""
        attention = self._blocks[0].self_attn
        head_dim = getattr(attention, "qk_head_dim", None) or attention.head_dim
        return packed_attention.serves(self.device, self.dtype, head_dim)

    def gate_bias(self, layer: int) -> torch.Tensor | None:
        """Of the router of a MoE layer: [E] float32, if it has one."""
        return self._gate_biases[layer]

    @property
    def keys_in_places(self) -> bool:
        """Does `start` take only steps of StepKeys?"""
        return False

    @property
    def caches_keys(self) -> bool:
        """Do attention modules cache keys and values themselves? (MLA caches latents, to compute them from.)"""
        return not hasattr(self._blocks[0].self_attn, "kv_lora_rank")

    def kept_bytes_per_token(self) -> int:
        """Bytes that one token of a cut sequence leaves in the StepCache, over all layers."""
        per_layer = sum(heads * size for heads, size in self.key_sizes()) * self.dtype.itemsize
        return per_layer * self.config.num_hidden_layers

    def key_sizes(self) -> list[tuple[int, int]]:
        """Heads and their size, of what a layer caches as keys and of what it caches as values."""
        step = self.new_step()
        self.attend(self.start(step, torch.zeros(1, dtype=torch.long, device="cpu"), [Piece(0, 0, 1, 2)]), 0, None)
        ((key, value),) = step.earlier(self._moe_layers[0], 0, 1)
        return [(kept.shape[1], kept.shape[3]) for kept in (key, value)]

    def lone_step(self, num_tokens: int) -> StepCache | StepOfKeys:
        """A step of one sequence of num_tokens tokens through the first two MoE layers, for measurements."""
        return self.new_step()

    def new_step(self) -> StepCache:
        """An empty cache for the sequences that the next step cuts over several microbatches."""
        return StepCache()

    @torch.no_grad()
    def start(self, step: StepCache | StepOfKeys, token_ids: torch.Tensor, pieces: Sequence[Piece]) -> MicrobatchState:
        """Embed one microbatch: token_ids [T_mb] int64 on the host, the pieces' tokens one after the other.

        Raises InputError when pieces and tokens do not fit or an id is outside the vocabulary.
        """
        packing = Packing(token_ids, pieces, self.vocab_size, self.device, step.begins)
        hidden = self._model.embed_tokens(packing.token_ids).unsqueeze(0)
        return MicrobatchState(packing, step.of(packing), hidden, self._rope(hidden, packing))

    def _rope(self, hidden: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the tokens' rotary embedding: [1, T_mb, D] each. hidden: for its dtype."""
        cos, sin = self._model.rotary_emb(hidden, packing.positions.unsqueeze(0))
        return cos, sin

    @torch.no_grad()
    def attend(
        self, state: MicrobatchState, layer: int, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """From the routed experts' result of MoE layer `layer - 1` to the router of MoE layer `layer`.

        y: [T_mb, H], any floating dtype, only read; None for layer 0.
        Returns x [T_mb, H] dtype, ids [T_mb, K] int32 (global expert ids), weights [T_mb, K] float32.
        """
        self._add_experts(state, layer, y)
        for block in self._dense[layer]:
            self._run_dense(state, block)
        block = self._blocks[layer]
        self._run_attention(state, block)
        x = block.post_attention_layernorm(state.hidden)
        state.layer = layer
        state.moe_input = x if self._shared_experts[layer] is not None else None
        rows = x[0]
        weight = self._gate_weights[layer]
        ids, weights = route(F.linear(rows.to(weight.dtype), weight), self.routing, self._gate_biases[layer])
        return rows, ids, weights

    @torch.no_grad()
    def run_shared(self, state: MicrobatchState) -> None:
        """Compute the shared experts of the layer attended last, while its dispatch is under way. Without this call the
        next attend or finish computes them.
        """
        if state.moe_input is not None:
            state.shared = self._shared_experts[state.layer](state.moe_input)
            state.moe_input = None

    @torch.no_grad()
    def finish(self, state: MicrobatchState, y: torch.Tensor) -> torch.Tensor:
        """From the last MoE layer's result y [T_mb, H] to logits [num_ends, V] float32.

        One row per piece that ends its sequence, in the pieces' order.
        """
        self._add_experts(state, len(self._blocks), y)
        for block in self._dense[-1]:
            self._run_dense(state, block)
        state.layer = len(self._blocks)
        ends = self._model.norm(state.hidden[0].index_select(0, state.packing.end_rows))
        return self._lm_head(ends).float()

    def _check_order(self, state: MicrobatchState, layer: int, y: torch.Tensor | None) -> None:
        if state.layer != layer - 1 or (y is None) != (layer == 0):
            given = "no y" if y is None else "a y"
            raise InputError(
                f"MoE layer {layer} of {len(self._blocks)} was asked for with {given} after layer {state.layer}; "
                "layers run in order, each but the first with the result of the one before"
            )
        if y is not None and tuple(y.shape) != tuple(state.hidden.shape[1:]):
            raise InputError(f"y has shape {tuple(y.shape)}; {tuple(state.hidden.shape[1:])} is wanted")

    def _add_experts(self, state: MicrobatchState, layer: int, y: torch.Tensor | None) -> None:
        self._check_order(state, layer, y)
        if y is None:
            return
        self.run_shared(state)
        # In place: one kernel that adds in the wider dtype. The residual belongs to this microbatch alone.
        state.hidden.add_(y)
        if state.shared is not None:
            state.hidden.add_(state.shared)
            state.shared = None

    def _run_attention(self, state: MicrobatchState, block: Any) -> None:
        if not state.packing.num_tokens:  # transformers' reshapes cannot infer a head count from no elements
            return
        attended, _ = block.self_attn(
            hidden_states=block.input_layernorm(state.hidden),
            position_embeddings=state.rope,
            attention_mask=None,
            past_key_values=state.cache,
            packing=state.packing,
        )
        state.hidden.add_(attended)

    def _run_dense(self, state: MicrobatchState, block: Any) -> None:
        self._run_attention(state, block)
        state.hidden.add_(block.mlp(block.post_attention_layernorm(state.hidden)))
