"""A whole model on the ranks of a world: load it, prefill sequences, get first tokens and their times."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import look, shown, whole_number
from pipemoe.config import Config, check_config
from pipemoe.errors import CheckpointError, ConfigError, InputError
from pipemoe.experts import make_experts
from pipemoe.model_facts.dimensions import dimensions_of_decoder
from pipemoe.models.rounds import DecoderRounds
from pipemoe.models.source import ModelSource, Prefilled
from pipemoe.plan.schedule import Op
from pipemoe.rolling.offer import MAX_CHUNKS
from pipemoe.runtime.reserve import is_out_of_memory, reserve_pinned
from pipemoe.runtime.run import Only
from pipemoe.runtime.runtime import Runtime
from pipemoe.runtime.source import SourceTraits
from pipemoe.torch_state import plain_tensors, undisturbed
from pipemoe.trace import Timeline
from pipemoe.warn_once import warn_once
from pipemoe.world.world import world_of

if TYPE_CHECKING:
    import torch

    from pipemoe.models.attention_choice import AttentionChoice
    from pipemoe.models.decoder import Decoder
    from pipemoe.models.graph_store import GraphStore
    from pipemoe.models.whole_graphs import WholeGraphs
    from pipemoe.world.world import World

_log = logging.getLogger("pipemoe")


def load_model(
    path_or_config: Any,
    world: World,
    *,
    random_weights: bool = False,
    config: Config = Config(),
    dtype: torch.dtype | None = None,
    seed: int = 0,
    router_skew: float = 0.0,
) -> Model:
    """Load a Mixture-of-Experts decoder: all of attention, and this rank's share of the routed experts. Every rank
    calls.

    path_or_config: a directory with a Hugging Face checkpoint (config.json and safetensors shards), or a transformers
    config for random weights drawn from `seed`. random_weights: draw weights for other inputs too: a dict like
    config.json, the path of such a file, or a directory that holds one. dtype: of weights and activations (default:
    bfloat16 on a GPU, float32 on the host). router_skew: of random weights. 0: all experts take about as many tokens;
    more: the exponent of a Zipf law over the experts of each layer (see models.random_parameters.expert_shares).

    Raises, on every rank, CheckpointError if any rank cannot load, ConfigError if memory does not suffice for the
    weights (see models.memory), and MismatchError if the ranks' checkpoints differ.
    """
    import torch

    from pipemoe.models.loading import PreparedDecoder, PreparedWhole, prepare_decoder
    from pipemoe.models.memory import shortage

    world, error = world_of(world)
    rank = f"rank {world.rank}: "
    where = shown(path_or_config)
    place: dict[str, Any] = {"rank": world.rank, "num_ranks": world.size, "device": world.device}

    def settings() -> dict[str, Any]:
        check_config(config, rank)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ConfigError(f"{rank}dtype is a {type(dtype).__name__}; it must be a torch.dtype, or None")
        if type(random_weights) is not bool:
            raise ConfigError(f"{rank}random_weights is {shown(random_weights)}; it must be True or False")
        return {
            "dtype": dtype or (torch.bfloat16 if world.device.type == "cuda" else torch.float32),
            "seed": whole_number(f"{rank}seed", seed, -(2**63), ConfigError),
            "quantised": config.experts == "hopper_fp8",
            "random_weights": random_weights,
            "router_skew": router_skew,
        }

    with undisturbed():
        prepared: PreparedDecoder | PreparedWhole | None = None
        found, wrong = look(world.rank, "settings of load_model", settings, ConfigError)
        error = error or wrong
        if error is None and found is not None:  # transformers and torch raise what they like at an odd config.json
            prepare = partial(prepare_decoder, path_or_config, **place, **found)
            prepared, error = look(world.rank, where, prepare, CheckpointError)
        world.agree(error, {}, "looking at the model's files")
        assert prepared is not None  # or `agree` has raised, as below
        world.agree(shortage(world, prepared.num_bytes), {}, "looking for memory for the model")
        loaded: Any  # either's
        loaded, error = look(world.rank, where, prepared.load, CheckpointError)
        world.agree(error, loaded[0].facts if loaded else {}, "loading the model")
        assert loaded is not None
        decoder, weights = loaded
        return Model(world, decoder, weights, config)


class Model:
    """A decoder and this rank's experts under one configuration."""

    def __init__(
        self, world: World, decoder: Decoder, weights: list, config: Config, attention: AttentionChoice | None = None
    ) -> None:
        """decoder: by transformers' modules. attention: another Model's, of the same decoder, to share and extend."""
        from pipemoe.models.attention_choice import AttentionChoice
        from pipemoe.models.whole_decoder import WholeDecoder

        if decoder.takes_whole_sequences and isinstance(config, Config):
            config = replace(config, whole_sequences=True)
        self.world, self.config = world, config
        self._plain, self._weights = decoder, weights
        self._attention = attention or AttentionChoice(decoder)
        self._whole: WholeGraphs | None = None  # of steps on a rank without peers
        self.decoder: Decoder
        self._graphs: GraphStore

        def look_at_config() -> tuple[Any, SourceTraits]:
            check_config(config, f"rank {world.rank}: ")
            self.decoder, self._graphs = self._attention.of(config, f"rank {world.rank}: ")
            self._graphs.prepare(config)
            decoder, has_places = self.decoder, self._graphs.has_places(config)
            kept = config.cuts_sequences and not has_places
            dimensions = dimensions_of_decoder(decoder.config.to_dict(), decoder.shape)
            if isinstance(decoder, WholeDecoder):
                dimensions = replace(dimensions, dense_weights=decoder.dense_weights)
            traits = SourceTraits(
                must_agree={"model": decoder.fingerprint},
                dimensions=dimensions,
                measured_cost=self._attention.measured.cost if decoder.cost_is_unknown else None,
                trial=self._trial,
                kept_bytes=config.max_tokens_per_rank * decoder.kept_bytes_per_token() if kept else 0,
                prepare=self._prepare,
                prepare_whole=self._capture_whole,
                graph_rows=self._graphs.most_rows(config),
                graph_cuts=self._graphs.serves_cuts(config),
            )
            experts = make_experts(
                weights,
                top_k=decoder.shape.top_k,
                hidden=decoder.shape.hidden,
                device=world.device,
                dtype=decoder.dtype,
                implementation=config.experts,
                deterministic=config.deterministic,
                num_experts=decoder.shape.num_experts,
                dispatch_dtype=config.torch_dispatch_dtype,
            )
            return experts, traits

        with undisturbed():
            found, error = look(world.rank, "the model's configuration", look_at_config, ConfigError)
            experts, traits = found or (None, SourceTraits())
            self.runtime = Runtime(world, decoder.shape, config, experts, decoder.dtype, traits, error=error)

    def _trial(self) -> None:
        """Attend to one sequence of the most tokens that a step may bring, in the first layers."""
        from pipemoe.models.lone_sequence import attend_alone

        attend_alone(self.decoder, self.config.max_tokens_per_rank, num_layers=2)

    def _prepare(self, slot: int, results_dtype: torch.dtype) -> None:
        """Make attention ready in a slot whose lane is the current stream: what a step runs, it must not be the first
        to run.
        """
        from pipemoe.models.fused_decoder import FusedDecoder

        self._capture(slot, results_dtype)
        if isinstance(self.decoder, FusedDecoder):
            new_step = partial(self._graphs.new_step, self.config)
            self.decoder.warm_up(new_step, self.config.max_tokens_per_rank, results_dtype)

    def _prepare_rounds(self, slot: int, results_dtype: torch.dtype, rows_of_slots: Sequence[int]) -> None:
        """As _prepare, which has been called, for rounds: they may have more keys than a step has."""
        from pipemoe.models.fused_decoder import FusedDecoder

        self._capture(slot, results_dtype)
        if isinstance(self.decoder, FusedDecoder) and slot < len(rows_of_slots):
            self.decoder.warm_up_keys(rows_of_slots[slot])

    def _capture(self, slot: int, results_dtype: torch.dtype) -> None:
        """Capture the attention of a slot whose lane is the current stream."""
        self._graphs.capture(self.config, slot, results_dtype)

    def _capture_whole(self, slot: int, results_dtype: torch.dtype, experts: Any, scratch: Any) -> None:
        """Capture all layers of small steps, which take slot 0, whose lane is the current stream."""
        from pipemoe.models.whole_graphs import WholeGraphs, serves

        keys, decoder = self._graphs.keys(self.config), self.decoder
        if slot or keys is None or not self._graphs.most_rows(self.config):
            return
        if not serves(decoder) or experts.wire_dtype != decoder.dtype:
            return
        try:
            self._whole = WholeGraphs(decoder, keys, results_dtype, experts, scratch)
        except (RuntimeError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            _log.warning("small steps run operation by operation, as they cannot be captured whole: %s", error)

    def with_config(self, config: Config) -> Model:
        """A model of the same weights under another configuration, with its own workspace. Every rank calls."""
        return Model(self.world, self._plain, self._weights, config, self._attention)

    def prefill(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        keep_logits: bool = False,
        only: Only = Only(),
        timeline: Timeline | None = None,
        on_done: Callable[[Op], None] = lambda op: None,
    ) -> Prefilled:
        """First tokens (greedy) of this rank's sequences. Every rank calls, with any number of sequences, even none.

        sequences: lists of token ids, each with at least one id and no more than the model has positions for. Returns
        as soon as this rank's own sequences are done, whatever the other ranks still have to do. only, timeline,
        on_done: for measurements, see Runtime.submit_step. (Without computation there are no tokens; then submit a step
        with a source of your own.)

        A sequence whose logits are infinite or NaN is False in Prefilled.finite, with a warning the first time. Raises,
        on every rank, InputError for bad token ids on any rank, and ModelError if any rank's model code raised.
        """
        begin = time.perf_counter()

        def look_at() -> list[torch.Tensor]:
            if type(keep_logits) is not bool:
                raise InputError(
                    f"rank {self.world.rank}: keep_logits is {shown(keep_logits)}; it must be True or False"
                )
            if isinstance(only, Only) and not only.computation:
                raise InputError(
                    f"rank {self.world.rank}: prefill without computation gives no tokens; use runtime.submit_step"
                )
            return self._check(sequences)

        with plain_tensors():
            tokens, error = look(self.world.rank, "sequences", look_at)
        tokens = tokens or []
        dtype = self.runtime.results_dtype
        graphs = [self._graphs.graphs(self.config, slot, dtype) for slot in range(self.world.num_slots)]
        new_step = partial(self._graphs.new_step, self.config)
        writes_rows = self.decoder.writes_rows and self.runtime.wire.dtype == self.decoder.dtype
        source = ModelSource(self.decoder, graphs, new_step, tokens, dtype, keep_logits, writes_rows, self._whole)
        step = self.runtime.submit_step(
            [len(t) for t in tokens], source, error=error, only=only, timeline=timeline, on_done=on_done
        )
        self.runtime.result_of(step)
        found = source.prefilled(begin)
        if not all(found.finite):
            words = (
                f"rank {self.world.rank}: logits of sequence {found.finite.index(False)} "
                "hold NaN or infinity, so that its first token says nothing"
            )
            warn_once(self.world, f"{words}; perhaps {self.decoder.dtype} is too narrow for this model", about="logits")
        return found

    @property
    def takes_chunks(self) -> bool:
        """Can rounds take a sequence chunk by chunk?"""
        in_places = self._graphs.has_places(self.config)
        return not self.config.whole_sequences and (in_places or self.world.device.type == "cpu")

    def rounds(self, rows_of_slots: Sequence[int], keep_logits: bool) -> DecoderRounds:
        """The decoder in rounds; see there. For set-up: reserves memory, and captures graphs anew if it must."""
        dtype = self.runtime.results_dtype
        self._whole = None  # it holds keys that may have to move
        found = DecoderRounds(
            self.decoder,
            self._graphs,
            self.config,
            dtype,
            rows_of_slots,
            writes_rows=self.decoder.writes_rows and self.runtime.wire.dtype == self.decoder.dtype,
            keep_logits=keep_logits,
        )
        if self.world.device.type == "cuda":
            prepare = partial(self._prepare_rounds, results_dtype=dtype, rows_of_slots=rows_of_slots)
            self.runtime.in_compute_lanes(prepare, "making the model ready for rounds")
            # A slot's round holds pinned memory for its ids, first tokens and logits.
            logits = MAX_CHUNKS * self.decoder.vocab_size * 4 if keep_logits else 0
            reserve_pinned(3 * len(rows_of_slots) + 1, logits)
        return found

    def no_rounds(self) -> None:
        """Give back what `rounds` has reserved, since an engine does not open; nobody may hold what it returned.
        Graphs are captured again for an engine that opens; until then steps launch kernel by kernel.
        """
        self._graphs.forget(self.config)

    def _check(self, sequences: Any) -> list[torch.Tensor]:
        """Each sequence's ids: [T] int64 on the host. Raises InputError for what is no list of token ids."""
        rank, most_tokens = f"rank {self.world.rank}: ", self.config.max_tokens_per_rank
        tensors = []
        if not isinstance(sequences, Iterable):
            raise InputError(f"{rank}sequences is a {type(sequences).__name__}; it must be a list of token-id lists")
        for i, sequence in enumerate(sequences):
            if i == most_tokens:  # an iterator may have no end
                raise InputError(
                    f"{rank}more than {most_tokens} sequences, so more than max_tokens_per_rank={most_tokens} tokens"
                )
            tensors.append(self.token_ids(f"sequence {i}", sequence))
        return tensors

    def token_ids(self, name: str, sequence: Any) -> torch.Tensor:
        """A sequence's ids: [T] int64 on the host. Raises InputError, with `name` in its words, for what is no list of
        token ids of this model, or longer than it has positions for.
        """
        import torch

        from pipemoe.models.config import num_positions

        where, vocabulary = f"rank {self.world.rank}: {name}", self.decoder.vocab_size
        tokens, error = look(self.world.rank, f"{name} is not a list of token ids", partial(token_ids, where, sequence))
        if error is not None:
            raise error
        assert tokens is not None
        low, high = (int(v) for v in torch.aminmax(tokens))
        if low < 0 or high >= vocabulary:
            raise InputError(f"{where} holds token id {low if low < 0 else high}; ids go from 0 to {vocabulary - 1}")
        most = num_positions(self.decoder.config)
        if most is not None and len(tokens) > most:
            raise InputError(
                f"{where} has {len(tokens)} tokens, but the model has positions for {most} (max_position_embeddings)"
            )
        return tokens


def token_ids(where: str, sequence: Any) -> torch.Tensor:
    """A copy of a sequence of ids: [T] int64 on the host. Any integer type will do; files of tokens are often uint16.

    Raises InputError, which begins with `where`, for anything else.
    """
    import numpy as np
    import torch

    if isinstance(sequence, np.ma.MaskedArray) and np.ma.is_masked(sequence):
        raise InputError(f"{where} has masked token ids; give those that are there alone")
    ids: Any
    if isinstance(sequence, torch.Tensor):
        is_whole = sequence.layout is torch.strided and not (
            sequence.is_floating_point() or sequence.is_complex() or sequence.is_quantized
        )
        is_bool, ids = sequence.dtype == torch.bool, sequence
    else:
        ids = np.asarray(sequence)
        is_whole, is_bool = (
            ids.dtype.kind in "iub",
            ids.dtype.kind == "b" or (isinstance(sequence, (list, tuple)) and bool in map(type, sequence)),
        )
    if ids.ndim == 1 and not len(ids):
        raise InputError(f"{where} is empty; it must be a list of at least one token id")
    if is_bool:
        raise InputError(f"{where} holds True or False; it must be a list of token ids")
    if not is_whole or ids.ndim != 1:
        raise InputError(f"{where} is not a list of token ids: it has shape {tuple(ids.shape)} and dtype {ids.dtype}")
    wide = (
        ids.to("cpu", torch.int64, copy=True)
        if isinstance(ids, torch.Tensor)
        else torch.from_numpy(ids.astype(np.int64))
    )
    if "uint64" in str(ids.dtype) and bool((wide < 0).any()):
        raise InputError(f"{where} holds token id {int(wide.min()) + 2**64}; ids are smaller")
    return wide
