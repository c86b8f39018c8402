"""One step of a runtime, on the conductor's thread: the exchange, the plan, all its operations, and the answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pipemoe.arguments import look, step_lengths
from pipemoe.comm.exchange import (
    decode_step,
    encode_step,
    has_error,
    pack_shared,
    shared,
    unpack_shared,
    words_of_error,
)
from pipemoe.errors import FatalError, InputError, MismatchError, PipemoeError, PlanError
from pipemoe.plan.projection import Issue
from pipemoe.plan.schedule import Facts, Op, Plan
from pipemoe.plan.verify import verify
from pipemoe.runtime.conductor import settle
from pipemoe.runtime.run import Only, Run
from pipemoe.runtime.source import Source
from pipemoe.runtime.whole_run import WholeRun
from pipemoe.trace import Span, Timeline

if TYPE_CHECKING:
    from pipemoe.runtime.runtime import Runtime


class StepArguments(NamedTuple):
    """What a caller asks of a step; see Runtime.submit_step."""

    lengths: tuple[int, ...] = ()
    only: Only = Only()
    timeline: Timeline | None = None
    on_done: Callable[[Op], None] = lambda op: None


def step_arguments(
    rank: int, max_tokens_per_rank: int, lengths: Any, only: Any, timeline: Any, on_done: Any
) -> StepArguments:
    """The arguments, checked. Raises InputError."""
    if not isinstance(only, Only):
        raise InputError(f"rank {rank}: only is a {type(only).__name__}; it must be a pipemoe.runtime.run.Only")
    for name in ("computation", "communication"):
        if type(getattr(only, name)) is not bool:
            raise InputError(
                f"rank {rank}: only.{name} is a {type(getattr(only, name)).__name__}; it must be True or False"
            )
    if timeline is not None and not isinstance(timeline, Timeline):
        raise InputError(
            f"rank {rank}: timeline is a {type(timeline).__name__}; it must be a pipemoe.trace.Timeline, or None"
        )
    if not callable(on_done):
        raise InputError(f"rank {rank}: on_done is a {type(on_done).__name__}; it must be a function of one operation")
    return StepArguments(step_lengths(rank, lengths, max_tokens_per_rank), only, timeline, on_done)


@dataclass(slots=True)
class Step:
    """error: why this rank cannot take part. future: the caller's."""

    runtime: Runtime
    arguments: StepArguments
    source: Source
    error: PipemoeError | None
    future: Future

    def run(self) -> None:
        """Resolves the future as soon as this rank's part is done, or at the end; raises what ends the step."""
        runtime, world, only, timeline = self.runtime, self.runtime.world, self.arguments.only, self.arguments.timeline
        conductor, future, debug = world.conductor, self.future, runtime.config.debug
        seconds = runtime.step_seconds()
        facts = self._exchange(seconds)
        runtime.begin_step()  # only now: if a rank called something else, no rank counts this step
        plan, error = look(world.rank, "planning", lambda: runtime.plans.of_step(facts), PlanError)
        digests = world.start_gathering(pack_shared(plan.digest if plan else b"", error), "comparison of plans")
        if plan is None:  # the others may have a plan, and be at work
            conductor.wait(digests.done, "comparison of plans", seconds=seconds, needs_all=True)
            self._compare(digests.payloads)
        assert plan is not None  # _compare raises for a rank without one
        if debug:
            runtime.transport.start_log()
        run = runtime.new_run(
            plan,
            self.source,
            only=only,
            timed=timeline is not None,
            on_progress=partial(conductor.note, seconds=seconds),
            on_progress_made=conductor.count_op,
            on_done=self.arguments.on_done,
        )
        compared, told = False, None

        def ready() -> bool:
            nonlocal compared, told
            if not compared and digests.done():
                self._compare(digests.payloads)
                compared = True
            try:
                done = run.advance()
            finally:
                # Errors and peers will name this.
                conductor.now_doing(run.failed_op or run.oldest() or run.not_begun() or conductor.doing)
            if run.own_finished == run.num_own and not future.done() and not debug and timeline is None:
                told = self._answer(run)
            return done and compared

        try:
            conductor.ask_patience(seconds)
            conductor.wait(ready, f"step {conductor.step}", seconds=seconds, rests=not run.spins)
        except FatalError:
            raise
        except PipemoeError as e:  # part of the plan has been issued here: the others wait for the rest
            raise FatalError(f"rank {world.rank}: {e} (in {conductor.doing})") from e
        runtime.count_issued(run.issued_seconds, len(plan.cohorts))
        if timeline is not None:
            spans = [Span(op, *event.span()) for op, event in run.completed]
            run.of_caller(lambda: timeline.take(spans, run.issue_seconds))
        if debug:
            self._check_issued(plan, seconds)
        conductor.ask_patience(0.0)
        if not future.done():
            self._answer(run)
        elif run.failure is not None and run.failure is not told:
            runtime.announce(run.failure)  # a caller's function raised after this rank's part was done

    def _answer(self, run: Run | WholeRun) -> BaseException | None:
        """Resolve the caller's future; returns the step's failure, if any."""
        failure = run.failure
        if failure is None:
            settle(self.future, time.perf_counter())
        else:
            settle(self.future, error=self.runtime.announce(failure))
        return failure

    def _exchange(self, seconds: float) -> Facts:
        world, (lengths, only, *_), error = self.runtime.world, self.arguments, self.error
        announced = world.take_announced()
        # If every rank's caller has already seen its own misuse, none needs to hear of it again: the step goes on.
        is_known = error is None and announced is not None and isinstance(announced.__cause__, InputError)
        error = announced or error
        doing = f"exchange of step {world.conductor.step + 1}"
        left_out = (not only.computation) + 2 * (not only.communication)
        told = lengths if error is None or is_known else ()
        message = encode_step(self.runtime.fingerprint, told, error, is_known=is_known, left_out=left_out)
        gathering = world.start_gathering(message, doing)
        world.conductor.wait(gathering.done, doing, seconds=seconds, needs_all=True)
        return decode_step(gathering.payloads)

    def _compare(self, told: list[bytes]) -> None:
        """Different plans would hang or corrupt the collectives: too late for a mild error, as long as some rank has
        one. told: each rank's plan's digest, or why it has no plan.
        """
        mine = self.runtime.world.rank
        without = [rank for rank, payload in enumerate(told) if has_error(payload)]
        if len(without) == len(told):
            unpack_shared(told)  # nobody has begun: raises the same on all
        if without:
            culprit = mine if mine in without else without[0]
            who = "" if culprit == mine else f"rank {culprit}: "
            text = f"rank {mine}: {who}no plan for this step: {words_of_error(told[culprit])}"
            raise FatalError(text, culprit=None if culprit == mine else culprit)
        odd = [rank for rank, digest in enumerate(told) if digest != told[0]]
        if odd:
            text = f"rank {mine}: rank {odd[0]} follows another plan than rank 0 (digests differ)"
            raise FatalError(text, culprit=odd[0]) from MismatchError("plan digests")

    def _check_issued(self, plan: Plan, seconds: float) -> None:
        """Compare the collectives that every rank has issued with the plan (debug)."""
        runtime, world = self.runtime, self.runtime.world
        log = runtime.transport.take_log()
        doing = "comparison of the ranks' logs"
        gathering = world.start_gathering(json.dumps(log).encode(), doing)
        world.conductor.wait(gathering.done, doing, seconds=seconds, needs_all=True)
        if self.arguments.only.communication and world.size > 1:
            issues = [[Issue(*entry) for entry in json.loads(p)] for p in gathering.payloads]
            try:
                sum_bytes = runtime.combine_dtype.itemsize
                verify(plan, row_bytes=runtime.wire.row_bytes, sum_bytes=sum_bytes, issues=issues, hosts=world.hosts)
            except PlanError as error:  # all ranks have the same logs
                raise shared(error) from None
