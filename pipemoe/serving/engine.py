"""The public Engine: prefill for whoever asks, whenever they ask. No rank waits for another's tokens, from step to step
either.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import look, shown, whole_number
from pipemoe.errors import ConfigError, FatalError, InputError, PipemoeError, forget_locals
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.engine_settings import engine_settings
from pipemoe.rolling.offer import HIGHEST_PRIORITY, LOWEST_PRIORITY
from pipemoe.rolling.round_time import RoundTime
from pipemoe.runtime.rolling import RollingLoop
from pipemoe.serving.requests import Requests
from pipemoe.serving.statistics import Collector, statistics

if TYPE_CHECKING:
    from pipemoe.model import Model

_WATCH_SECONDS = 0.25
WHEN_FULL = ("error", "wait")


class Engine:
    """Serves a model's prefill on all ranks of its world. Every rank opens one, with the same arguments.

    Each slot of the world goes from round to round by itself: a long prompt goes chunk by chunk through the last slot
    while short ones pass through whichever is free. Ranks without requests take part by themselves, since their experts
    are needed. While an Engine is open the world does nothing else.

        with pipemoe.Engine(model) as engine:
            first = engine.submit([1, 2, 3]).result()
            first.token
    """

    def __init__(
        self,
        model: Model,
        *,
        policy: str = "rolling",
        max_queue: int = 1024,
        when_full: str = "error",
        max_kept_tokens: int | None = None,
        step_tokens: int | None = None,
        num_slots: int | None = None,
        delay_seconds: float = 0.0,
        keep_logits: bool = False,
    ) -> None:
        """policy: "rolling"; or, to compare with, one slot for everything: "lockstep", "lockstep_balanced" (the same;
        requests are to be given to the rank with least waiting tokens) and "lockstep_delayed" (a rank's offers wait up
        to `delay_seconds` for other ranks to have some). max_queue: requests of this rank that may wait to be admitted.
        when_full: "error" (submit raises QueueFull) or "wait" (submit waits). max_kept_tokens: tokens of unfinished
        sequences in the last slot whose keys and values this rank keeps between rounds, and so the longest prompt
        (default: twice max_tokens_per_rank). step_tokens: of one rank in a round, at most; policy "rolling" then also
        takes prompts up to this length for short ones. Default: rolling rounds and chunks are sized by the cost model,
        in lockstep it is 2048, or what max_tokens_per_rank allows. Models that take whole sequences only put up to
        max_tokens_per_rank in a round. num_slots: of the configuration's slots, how many roll (default: all, but no
        more than gain by the cost model, 1 or 2 on GPUs; in lockstep always 1). keep_logits: futures get logits too.

        Raises, on every rank, ConfigError for arguments that cannot work, or if memory for keys, values and graphs does
        not suffice; MismatchError if the ranks' arguments differ; ModelError if a first step of one token fails on some
        rank; InputError while another Engine is open.
        """
        self.model, self._world = model, model.world
        world, runtime = model.world, model.runtime

        def settle() -> tuple[RollingSettings, list[int], dict[str, str]]:
            settings = engine_settings(
                policy,
                step_tokens,
                max_tokens_per_rank=runtime.config.max_tokens_per_rank,
                num_ranks=world.size,
                cuts=model.takes_chunks,
                num_slots=num_slots,
                times=RoundTime(runtime.shape, runtime.cost, world.size, runtime.config.moe_max_num_tokens),
            )
            if settings.most_slots > runtime.config.max_slots and num_slots is not None:
                raise ConfigError(f"num_slots is {num_slots}; the model's configuration has {runtime.config.max_slots}")
            rows = self._rows_of_slots(settings, max_kept_tokens)
            if when_full not in WHEN_FULL:
                raise ConfigError(f"when_full is {shown(when_full)}; it must be one of {', '.join(WHEN_FULL)}")
            if type(keep_logits) is not bool:
                raise ConfigError(f"keep_logits is {shown(keep_logits)}; it must be True or False")
            if not isinstance(delay_seconds, (int, float)) or not 0 <= delay_seconds < math.inf:
                raise ConfigError(f"delay_seconds is {shown(delay_seconds)}; it must be a number of at least 0")
            whole_number("max_queue", max_queue, 1, ConfigError)
            given = {"policy": policy, "step_tokens": settings.chunk_tokens, "max_kept_tokens": rows[-1]}
            given |= {"num_slots": len(rows)}
            given |= {"delay_seconds": delay_seconds, "keep_logits": keep_logits}
            return settings, rows, {name: str(value) for name, value in given.items()}

        found, error = look(world.rank, "opening an engine", settle, ConfigError)
        settings, rows, facts = found or (RollingSettings(1, 1, 1), [], {})
        world.agree(error, facts, "opening an engine")
        self.settings, self._longest = settings, rows[-1] if settings.cuts else settings.max_tokens_per_round

        def reserve() -> None:
            self._rounds = model.rounds(rows, bool(keep_logits))

        self._on_all_ranks("memory for an engine", reserve)
        # What is compiled or loaded at first use is so before the first round.
        self._on_all_ranks("an engine's first step", lambda: model.prefill([[0]]))
        self.requests = Requests(
            world.rank,
            world.conductor,
            self._rounds,
            settings,
            max_queue=max_queue,
            waits_when_full=when_full == "wait",
        )
        number = world.number_runtime()
        world.conductor.call(world.prepare_rounds)
        fingerprint = hashlib.blake2b(runtime.fingerprint + json.dumps(facts).encode(), digest_size=16).digest()
        self._loop = RollingLoop(
            runtime,
            settings,
            self.requests,
            self.requests.take_news,
            engine=number,
            fingerprint=fingerprint,
            delay_seconds=delay_seconds,
        )
        world.begin_rolling(self)
        self._task = world.conductor.submit(self._roll)

    def _on_all_ranks(self, doing: str, work: Callable[[], object]) -> None:
        """If it fails on one rank, all give back what rounds have reserved, and raise its error."""
        _, error = look(self._world.rank, doing, work, ConfigError)
        try:
            self._world.agree(error, {}, doing)
        except PipemoeError:
            self._world.take_announced()  # a failed step is told here, not in the next one
            vars(self).pop("_rounds", None)  # nothing may hold what is given back
            if error is not None:
                forget_locals(error)
            self.model.no_rounds()
            raise

    def _rows_of_slots(self, settings: RollingSettings, max_kept_tokens: int | None) -> list[int]:
        """Tokens whose keys and values each slot may hold."""
        num_slots = settings.num_slots(self.model.runtime.config.max_slots)
        usual = 2 * self.model.runtime.config.max_tokens_per_rank
        kept = usual if max_kept_tokens is None else whole_number("max_kept_tokens", max_kept_tokens, 1, ConfigError)
        if kept < settings.max_tokens_per_round:
            raise ConfigError(
                f"max_kept_tokens is {kept}; it must be at least the tokens of a round, {settings.max_tokens_per_round}"
            )
        return [2 * settings.max_tokens_per_round] * (num_slots - 1) + [kept]

    def _roll(self) -> None:
        """The conductor's task."""
        try:
            self._loop.run()
        except FatalError:
            raise  # the conductor tells the futures
        except PipemoeError as error:
            self.requests.end(error)
            raise
        finally:
            self._world.end_rolling()
        self.requests.end()

    def submit(self, tokens: Sequence[int], priority: int = 0) -> Future:
        """Ask for the first token after `tokens`, from any thread. Returns a concurrent.futures.Future of a FirstToken.

        tokens: at least one id, at most as many as max_kept_tokens allows. priority: -128 to 127; higher goes first
        within this rank and among ranks. The future may be cancelled for as long as it has no result; what has been
        admitted by then is computed in vain.

        The future raises InputError for tokens or a priority that are wrong, ModelError if this rank's model code
        raised in a round with this request, and whatever ends the ranks' work. Raises QueueFull if max_queue requests
        wait and when_full is "error"; InputError once `close` has been called.
        """

        def look_at() -> tuple[Any, int]:
            ids = self.model.token_ids("tokens", tokens)
            if len(ids) > self._longest:
                raise InputError(
                    f"rank {self._world.rank}: a prompt of {len(ids)} tokens; this engine takes at most {self._longest}"
                    + (" (max_kept_tokens)" if self.settings.cuts else ", since this model takes whole sequences only")
                )
            number = whole_number("priority", priority, LOWEST_PRIORITY)
            if number > HIGHEST_PRIORITY:
                raise InputError(f"priority is {number}; it must be from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}")
            return ids, number

        found, error = look(self._world.rank, "tokens", look_at)
        if found is None:
            assert error is not None
            return self.requests.refused(error)
        return self.requests.submit(*found)

    def drain(self, seconds: float | None = None) -> bool:
        """Wait until all requests of this rank have results; False if they have not after `seconds`.

        Other threads may submit meanwhile. Raises what has ended the ranks' work.
        """
        return self.requests.wait_until_answered(seconds)

    def close(self) -> None:
        """Take no more requests, answer those that are there, and wait until all ranks have closed: until then this
        rank serves the others. A second call does nothing. Raises what has ended the ranks' work.
        """
        self.requests.close()
        while not wait_for([self._task], _WATCH_SECONDS).done:
            self._world.conductor.watch()
        self._task.result()

    def leave(self, because: str) -> None:
        """The world closes. because: what has gone wrong here; then this rank waits for nobody, and the others lose
        it.
        """
        if not because:
            self.close()
            return
        self.requests.close()
        self._loop.abandon(InputError(f"rank {self._world.rank}: the world has been closed because of {because}"))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """After an exception it takes no more requests, but waits for nobody, so that the exception is seen first."""
        if kind is None:
            self.close()
        else:
            self.requests.close()

    def statistics(self) -> dict[str, Any]:
        """What a monitor may want to know of this rank, see docs/engine.md. Never waits."""
        return statistics(self._loop, self.requests, self._rounds)

    def collector(self) -> Collector:
        """The same for a registry of prometheus-client: `REGISTRY.register(engine.collector())`. Raises ConfigError if
        prometheus-client is not installed.
        """
        return Collector(self._world.rank, self.statistics)
