"""A whole model on the ranks of a world: load it, prefill sequences, get first tokens and their times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import look, shown, whole_number
from pipemoe.config import Config, check_config
from pipemoe.errors import CheckpointError, ConfigError, InputError
from pipemoe.experts import make_experts
from pipemoe.plan.cost.dimensions import dimensions_of_decoder
from pipemoe.plan.schedule import Op, Plan
from pipemoe.runtime.run import Only
from pipemoe.runtime.runtime import Runtime
from pipemoe.torch_state import plain_tensors, undisturbed
from pipemoe.trace import Timeline
from pipemoe.warn_once import warn_once
from pipemoe.world.world import world_of

if TYPE_CHECKING:
    import torch

    from pipemoe.models.cache import StepCache
    from pipemoe.models.decoder import Decoder
    from pipemoe.models.graph_store import GraphStore
    from pipemoe.models.microbatch import AttendGraphs, EagerMicrobatch, GraphedMicrobatch
    from pipemoe.models.step_keys import StepOfKeys
    from pipemoe.world.world import World


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a step gave this rank, per sequence in the order handed in."""

    first_tokens: list[int]
    ttft_seconds: list[float]  # from the call of prefill to the sequence's first token
    logits: torch.Tensor | None  # [sequences, V] float32, if asked for
    finite: list[bool]  # False: the sequence's logits hold NaN or infinity, so that its first token says nothing


def load_model(
    path_or_config: Any,
    world: World,
    *,
    random_weights: bool = False,
    config: Config = Config(),
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Model:
    """Load a Mixture-of-Experts decoder: attention everywhere, of the routed experts only this rank's; every rank
    calls.

    path_or_config: a directory with a Hugging Face checkpoint (config.json and safetensors shards), or a transformers
    config for random weights drawn from `seed`. random_weights: draw them also for a dict like config.json, for the
    path of one, or of a directory that holds one. dtype: of weights and activations (default: bfloat16 on a GPU,
    float32 on the host). Raises CheckpointError on every rank if any of them cannot load, ConfigError if the weights
    are more than the memory there (see models.memory), MismatchError if their checkpoints differ.
    """
    import torch

    from pipemoe.models.loading import PreparedDecoder
    from pipemoe.models.memory import shortage

    world, error = world_of(world)
    rank = f"rank {world.rank}: "
    where = shown(path_or_config)
    place = {"rank": world.rank, "num_ranks": world.size, "device": world.device}

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
        }

    with undisturbed():
        prepared = None
        found, wrong = look(world.rank, "settings of load_model", settings, ConfigError)
        error = error or wrong
        if error is None:  # transformers and torch raise what they like at an odd config.json
            prepared, error = look(
                world.rank, where, lambda: PreparedDecoder(path_or_config, **place, **found), CheckpointError
            )
        world.agree(error, {}, "looking at the model's files")
        world.agree(shortage(world, prepared.num_bytes), {}, "looking for memory for the model")
        loaded, error = look(world.rank, where, prepared.load, CheckpointError)
        world.agree(error, loaded[0].facts if loaded else {}, "loading the model")
        return Model(world, *loaded, config)


class Model:
    """A decoder and this rank's experts under one configuration."""

    def __init__(
        self, world: World, decoder: Decoder, weights: list, config: Config, graphs: GraphStore | None = None
    ) -> None:
        """graphs: those of another Model with the same decoder, to share and add to."""
        from pipemoe.models.graph_store import GraphStore

        self.world, self.decoder, self.config = world, decoder, config
        self._weights = weights
        self._graphs = graphs or GraphStore(decoder)
        in_places = False  # keys and values have places of their own

        def look_at_config() -> dict[str, Any]:
            nonlocal in_places
            check_config(config, f"rank {world.rank}: ")
            in_places = self._graphs.serves_cuts(config)
            kept = config.cuts_sequences and not in_places
            return {
                "dimensions": dimensions_of_decoder(decoder.config.to_dict(), decoder.shape),
                "kept_bytes": config.max_tokens_per_rank * decoder.kept_bytes_per_token() if kept else 0,
                "graph_rows": self._graphs.most_rows(config),
                "experts": make_experts(
                    weights,
                    top_k=decoder.shape.top_k,
                    hidden=decoder.shape.hidden,
                    device=world.device,
                    dtype=decoder.dtype,
                    implementation=config.experts,
                    deterministic=config.deterministic,
                    num_experts=decoder.shape.num_experts,
                    dispatch_dtype=config.torch_dispatch_dtype,
                ),
            }

        with undisturbed():
            found, error = look(world.rank, "the model's configuration", look_at_config, ConfigError)
            found = found or {"experts": None}
            self.runtime = Runtime(
                world,
                decoder.shape,
                config,
                found.pop("experts"),
                decoder.dtype,
                {"model": decoder.fingerprint},
                trial=self._trial,
                prepare=self._capture,
                graph_cuts=in_places,
                error=error,
                **found,
            )

    def _trial(self) -> None:
        """Attend to one sequence of the most tokens that a step may bring, in the first layers."""
        import torch

        from pipemoe.models.decoder import Piece

        count, decoder = self.config.max_tokens_per_rank, self.decoder
        state = decoder.start(
            decoder.new_step(), torch.zeros(count, dtype=torch.long, device="cpu"), [Piece(0, 0, count, count)]
        )
        y = None
        for layer in range(min(2, decoder.shape.num_layers)):
            decoder.attend(state, layer, y)
            y = torch.zeros((count, decoder.shape.hidden), dtype=torch.float32, device=decoder.device)

    def _capture(self, slot: int, results_dtype: torch.dtype) -> None:
        """Capture the attention of a slot whose lane is the current stream."""
        self._graphs.capture(self.config, slot, results_dtype)

    def with_config(self, config: Config) -> Model:
        """The same weights under another configuration, with a workspace of its own; every rank calls."""
        return Model(self.world, self.decoder, self._weights, config, self._graphs)

    def prefill(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        keep_logits: bool = False,
        only: Only = Only(),
        timeline: Timeline | None = None,
        on_done: Callable[[Op], None] = lambda op: None,
    ) -> Prefilled:
        """First tokens (greedy) of this rank's sequences; every rank calls, with any number of sequences, also none.

        sequences: token ids, each sequence with at least one and at most as many as the model has positions for.
        Returns as soon as this rank's own sequences are done, whatever the other ranks still have to do. only,
        timeline, on_done: see Runtime.submit_step; for measurements (without computation there are no tokens: submit a
        step with a source of your own instead). A sequence whose logits overflow or are NaN has its flag in
        Prefilled.finite, and a warning, once. Raises InputError for bad token ids on any rank, ModelError if the model
        code of some rank raised, on every rank.
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
        source = _ModelSource(self.decoder, graphs, new_step, tokens, dtype, keep_logits)
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

    def _check(self, sequences: Any) -> list[torch.Tensor]:
        """Each sequence's ids: [T] int64 on the host. Raises InputError for what is no list of token ids."""
        import torch

        from pipemoe.models.config import num_positions

        rank, most_tokens = f"rank {self.world.rank}: ", self.config.max_tokens_per_rank
        vocabulary, most = self.decoder.vocab_size, num_positions(self.decoder.config)
        tensors = []
        if not isinstance(sequences, Iterable):
            raise InputError(f"{rank}sequences is a {type(sequences).__name__}; it must be a list of token-id lists")
        for i, sequence in enumerate(sequences):
            if i == most_tokens:  # an iterator may have no end
                raise InputError(
                    f"{rank}more than {most_tokens} sequences, so more than max_tokens_per_rank={most_tokens} tokens"
                )
            where = f"{rank}sequence {i}"
            tokens, error = look(
                self.world.rank, f"sequence {i} is not a list of token ids", partial(token_ids, where, sequence)
            )
            if error is not None:
                raise error
            low, high = (int(v) for v in torch.aminmax(tokens))
            if low < 0 or high >= vocabulary:
                raise InputError(
                    f"{where} holds token id {low if low < 0 else high}; ids go from 0 to {vocabulary - 1}"
                )
            if most is not None and len(tokens) > most:
                raise InputError(
                    f"{where} has {len(tokens)} tokens, but the model has positions for {most} "
                    "(max_position_embeddings)"
                )
            tensors.append(tokens)
        return tensors


def token_ids(where: str, sequence: Any) -> torch.Tensor:
    """A sequence of ids of any integer type, signed or not (files of tokens are often uint16): [T] int64 on the host, a
    copy.

    Raises InputError, which begins with `where`, if it is none.
    """
    import numpy as np
    import torch

    if isinstance(sequence, np.ma.MaskedArray) and np.ma.is_masked(sequence):
        raise InputError(f"{where} has masked token ids; give those that are there alone")
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


class _ModelSource:
    """Rows from the decoder; results back into it."""

    def __init__(
        self,
        decoder: Decoder,
        graphs: list[AttendGraphs | None],
        new_step: Callable[[Sequence[int]], StepCache | StepOfKeys],
        tokens: list[torch.Tensor],
        results_dtype: torch.dtype,
        keep_logits: bool,
    ) -> None:
        """graphs: per slot. new_step: see GraphStore.new_step."""
        self._decoder, self._graphs, self._tokens, self._results_dtype = decoder, graphs, tokens, results_dtype
        self._new_step, self._keep_logits = new_step, keep_logits
        self.has_side_work = decoder.has_shared_experts
        self._microbatches: dict[int, EagerMicrobatch | GraphedMicrobatch] = {}  # per cohort
        self._rows: dict[int, tuple] = {}
        self._ranges: dict[int, list[tuple[int, int, int]]] = {}  # per cohort: start, stop, row
        self._ended: dict[int, list[int]] = {}  # per cohort: sequences whose last token it holds
        self._first: dict[int, tuple] = {}  # per cohort: first tokens and whether logits are finite (host), logits
        self._seconds: dict[int, float] = {}

    def begin(self, plan: Plan, rank: int) -> None:
        self._bounds = plan.facts.boundaries[rank]
        self._step = self._new_step(self._bounds)
        self._slots = [cohort.slot for cohort in plan.cohorts]
        for c, cohort in enumerate(plan.cohorts):
            row, ranges = 0, []
            for m in sorted(m for m in cohort.microbatches if m.rank == rank):
                ranges.append((m.start, m.stop, row))
                row += m.stop - m.start
            self._ranges[c] = ranges

    def ready(self, cohort: int, layer: int) -> bool:
        return True

    def attend(self, cohort: int, layer: int) -> None:
        if layer == 0:
            self._start(cohort)
        self._rows[cohort] = self._microbatches[cohort].attend(layer)

    def _start(self, cohort: int) -> None:
        import torch

        from pipemoe.models.microbatch import start_microbatch
        from pipemoe.models.packing import Piece

        pieces: list[Piece] = []
        for start, stop, _ in self._ranges[cohort]:
            for i, (begin, end) in enumerate(zip(self._bounds, self._bounds[1:])):
                a, b = max(start, begin) - begin, min(stop, end) - begin
                if a >= b:
                    continue
                if pieces and pieces[-1].sequence == i and pieces[-1].stop == a:
                    a = pieces.pop().start  # two chunks side by side in one cohort
                pieces.append(Piece(i, a, b, end - begin))
        ids = torch.cat([self._tokens[p.sequence][p.start : p.stop] for p in pieces])
        self._ended[cohort] = [p.sequence for p in pieces if p.stop == p.length]
        graphs = self._graphs[self._slots[cohort]]
        self._microbatches[cohort] = start_microbatch(
            self._decoder, graphs, self._step, ids, pieces, self._results_dtype
        )

    def _row(self, cohort: int, token: int) -> int:
        return next(row + token - start for start, stop, row in self._ranges[cohort] if start <= token < stop)

    def rows(self, cohort: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = self._row(cohort, start)
        x, ids, weights = self._rows[cohort]
        return x[row : row + stop - start], ids[row : row + stop - start], weights[row : row + stop - start]

    def side_work(self, cohort: int) -> None:
        self._microbatches[cohort].run_shared()

    def results(self, cohort: int, start: int, stop: int) -> torch.Tensor:
        row = self._row(cohort, start)
        return self._microbatches[cohort].sums[row : row + stop - start]

    def combined(self, cohort: int, layer: int, event: Any) -> None:
        pass

    def finish(self, cohort: int) -> None:
        import torch

        logits = self._microbatches[cohort].finish()
        low, high = torch.aminmax(logits, dim=-1)  # NaN if any logit is
        first = torch.stack((logits.argmax(-1), (torch.isfinite(low) & torch.isfinite(high)).long()))  # [2, sequences]
        if first.is_cuda:
            host = torch.empty(first.shape, dtype=first.dtype, device="cpu", pin_memory=True)
            first = host.copy_(first, non_blocking=True)
        self._first[cohort] = (first, logits if self._keep_logits else None)

    def finished(self, cohort: int, seconds: float) -> None:
        self._seconds[cohort] = seconds

    def prefilled(self, begin: float) -> Prefilled:
        """What the step gave, once it is over."""
        import torch

        count = len(self._tokens)
        first, finite, seconds, logits = [0] * count, [True] * count, [0.0] * count, [None] * count
        for cohort, (tokens, scores) in self._first.items():
            if scores is not None and scores.is_cuda:
                scores.record_stream(torch.cuda.current_stream())  # made on a lane's stream, read on the caller's
            for i, sequence in enumerate(self._ended[cohort]):
                first[sequence], finite[sequence] = int(tokens[0, i]), bool(tokens[1, i])
                seconds[sequence] = self._seconds[cohort] - begin
                logits[sequence] = scores[i] if scores is not None else None
        kept = torch.stack(logits) if self._keep_logits and count else None
        return Prefilled(first, seconds, kept, finite)
