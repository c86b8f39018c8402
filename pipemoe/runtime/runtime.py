"""The runtime: one model's experts and workspace on this rank, and the steps that run through them."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import asdict, replace
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
from pipemoe.config import Config
from pipemoe.errors import (
    ConfigError,
    FatalError,
    InputError,
    MismatchError,
    ModelError,
    PipemoeError,
    PlanError,
    describe,
)
from pipemoe.plan.clock.sms import possible_sms_left
from pipemoe.plan.cost.dimensions import dimensions_of_shape
from pipemoe.plan.planner import compile_planner, planner_is_kept
from pipemoe.plan.planner import plan as make_plan
from pipemoe.plan.projection import Issue
from pipemoe.plan.schedule import Facts, Microbatch, ModelShape, Op, Plan
from pipemoe.plan.verify import verify
from pipemoe.runtime.conductor import settle
from pipemoe.runtime.costs import runtime_cost
from pipemoe.runtime.run import Only, Run
from pipemoe.runtime.set_up import SetUp
from pipemoe.runtime.source import Source, SourceTraits
from pipemoe.runtime.workspace import shared_layout
from pipemoe.trace import Span, Timeline
from pipemoe.version import __version__
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.shared.waves import SharedWaves
    from pipemoe.world.world import World

_CACHED_PLANS = 64
_WATCH_SECONDS = 0.25  # how often a waiting caller checks the conductor


class Issued(NamedTuple):
    """What issuing the layers' operations has cost so far: sums over steps of `seconds` of the conductor's thread, and
    of `layers`, counted once for each cohort.
    """

    seconds: float = 0.0
    layers: int = 0

    def plus(self, seconds: float, layers: int) -> Issued:
        return Issued(self.seconds + seconds, self.layers + layers)


class Runtime:
    """Experts, workspace and plans of one configuration; every rank makes one with the same arguments."""

    def __init__(
        self,
        world: World,
        shape: ModelShape,
        config: Config,
        experts: Any,
        dtype: torch.dtype,
        traits: SourceTraits,
        *,
        error: PipemoeError | None = None,
    ) -> None:
        """experts: this rank's experts (see pipemoe.experts). dtype: of the hidden values that sources give. traits: of
        the steps' sources. error: what has already gone wrong on this rank; raised on every rank.
        """
        import torch

        self.world, self.shape, self.config, self.dtype = world, shape, config, dtype
        self._experts, is_gpu = experts, world.device.type == "cuda"
        _, found = look(world.rank, "looking at the configuration", self._settle, ConfigError)
        world.agree(error or found, {}, "looking at the configuration")  # from here on every rank has what it needs
        self.cost, self.cost_subject, error = runtime_cost(
            world,
            traits.dimensions or dimensions_of_shape(shape),
            self.config,
            dtype,
            self.combine_dtype,
            self.wire,
            graph_rows=traits.graph_rows,
            graph_cuts=traits.graph_cuts,
            num_sms=experts.num_sms,
        )
        self._number = world.number_runtime()
        compared, found = look(
            world.rank,
            "looking at the costs",
            lambda: (possible_sms_left(self.config, self.cost.sms), self._facts(traits.must_agree)),
            ConfigError,
        )
        sms_left, facts = compared or ((), {})
        world.agree(error or found, facts, "comparing configurations")
        self.fingerprint = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).digest()
        self._compile_planner()
        self._shared: SharedWaves | None = None
        if world.shared is not None:
            self._shared = world.new_waves(shared_layout(self.config, self.wire, self.combine_dtype, world.size))
        self.transport: Any = world.transport if self._shared is None else self._shared
        set_up = SetUp(
            world,
            shape,
            self.config,
            dtype,
            self.wire,
            self.combine_dtype,
            experts,
            traits,
            sms_left,
            torch.cuda.current_stream(world.device) if traits.hands_out_results and is_gpu else None,
            self._shared,
        )
        _, error = world.conductor.call(lambda: look(world.rank, "setting up", set_up.run, ConfigError))
        world.agree(error, {}, "setting up the workspace")
        self._workspace = set_up.workspace
        self.experts_with_free_sms, self._tapes = set_up.experts_with_free_sms, set_up.tapes
        self.plays_tapes = self._tapes is not None  # else every operation is issued by Python
        self.issued = Issued()
        self._plans: OrderedDict[Facts, Plan] = OrderedDict()
        self._is_first_step = True  # the caller's code may compile in it, so it may take longer

    def _settle(self) -> None:
        """Settle every value of the configuration, or raise ConfigError."""
        world, shape = self.world, self.shape
        self.config = config = self.config.in_world(world.num_slots)
        self.wire = WireFormat(shape.hidden, shape.top_k, self._experts.wire_dtype)
        self.combine_dtype = self._combine_dtype(self.dtype)
        if world.device.type == "cpu" and config.combine == "reduce" and self.combine_dtype.itemsize < 4:
            raise ConfigError(
                f"combine_dtype is {config.combine_dtype}, which MPI cannot reduce on the host; leave it out, or "
                "use combine='gather'"
            )

    def _compile_planner(self) -> None:
        """Compile what planning needs. The first rank of each host does it, once per machine; the others read it.

        Where nothing can be kept on disk, all ranks compile at once.
        """
        world, config = self.world, replace(self.config, num_sms=None)
        hosts = world.all_gather(socket.gethostname().encode(), "compiling the planner")
        waits = hosts.index(hosts[world.rank]) != world.rank and planner_is_kept()
        for turn in (not waits, waits):
            error = None
            if turn:
                _, error = look(
                    world.rank,
                    "planning",
                    lambda: compile_planner(world.size, self.shape, config, self.cost),
                    ConfigError,
                )
            world.agree(error, {}, "compiling the planner")

    @property
    def workspace_bytes(self) -> int:
        """Bytes that exchange and experts take on this rank, allocated once."""
        return self._workspace.num_bytes

    @property
    def results_dtype(self) -> torch.dtype:
        """The dtype of a source's results."""
        return self._workspace.results_dtype

    def _combine_dtype(self, dtype: torch.dtype) -> torch.dtype:
        import torch

        if self.config.deterministic:
            return torch.float64
        if self.config.combine_dtype is not None:
            return getattr(torch, self.config.combine_dtype)
        return dtype if self.world.device.type == "cuda" else torch.float32

    def _facts(self, must_agree: Mapping[str, str]) -> dict[str, str]:
        import torch

        facts = {**must_agree, "number of this model or PipelinedMoE": str(self._number)}
        facts |= {"pipemoe": __version__, "torch": torch.__version__, "device": self.world.device.type}
        facts |= {"dtype": str(self.dtype), "dispatch": str(self.wire.dtype)}
        facts |= {
            name: str(value) for name, value in (asdict(self.config) | asdict(self.shape)).items() if name != "cost"
        }
        facts |= {f"cost of {name}": str(value) for name, value in asdict(self.cost).items()}
        if self.world.device.type == "cuda" and self.world.size > 1:
            from pipemoe.comm import nccl

            facts |= {"NCCL": str(nccl.version()), "NCCL_MAX_CTAS": str(nccl.max_ctas())}
        return facts

    def submit_step(
        self,
        lengths: Sequence[int],
        source: Source,
        *,
        error: PipemoeError | None = None,
        only: Only = Only(),
        timeline: Timeline | None = None,
        on_done: Callable[[Op], None] = lambda op: None,
    ) -> Future:
        """Run one step: exchange, plan, all operations. Every rank calls.

        lengths: this rank's sequences, in tokens. error: why this rank cannot take part; raised on every rank before
        any row moves. The future is resolved as soon as this rank's own cohorts have finished, while the conductor does
        the rest; with `timeline` or debug, when the whole plan has finished. Raises InputError on a thread that is
        inside a PipelinedMoE's step: the new step would wait for the open one, and that for the thread.
        """
        self.world.check_no_step_is_open()
        future: Future = Future()
        looked, wrong = look(
            self.world.rank, "arguments of a step", lambda: self._look_at(lengths, only, timeline, on_done)
        )
        if looked is None:
            looked, error = ((), Only(), None, on_done), error or wrong
        return self.world.conductor.submit(lambda: self._step(*looked, source, error, future), future)

    def result_of(self, future: Future) -> Any:
        """Wait for a step's result, and watch the conductor meanwhile. In a world of one rank nobody else does."""
        while not wait_for([future], _WATCH_SECONDS).done:
            self.world.conductor.watch()
        return future.result()

    def _look_at(
        self, lengths: Any, only: Any, timeline: Any, on_done: Any
    ) -> tuple[tuple[int, ...], Only, Timeline | None, Callable]:
        rank = f"rank {self.world.rank}: "
        if not isinstance(only, Only):
            raise InputError(f"{rank}only is a {type(only).__name__}; it must be a pipemoe.runtime.run.Only")
        for name in ("computation", "communication"):
            if type(getattr(only, name)) is not bool:
                raise InputError(
                    f"{rank}only.{name} is a {type(getattr(only, name)).__name__}; it must be True or False"
                )
        if timeline is not None and not isinstance(timeline, Timeline):
            raise InputError(
                f"{rank}timeline is a {type(timeline).__name__}; it must be a pipemoe.trace.Timeline, or None"
            )
        if not callable(on_done):
            raise InputError(f"{rank}on_done is a {type(on_done).__name__}; it must be a function of one operation")
        return step_lengths(self.world.rank, lengths, self.config.max_tokens_per_rank), only, timeline, on_done

    def _step(
        self,
        lengths: tuple[int, ...],
        only: Only,
        timeline: Timeline | None,
        on_done: Callable[[Op], None],
        source: Source,
        error: PipemoeError | None,
        future: Future,
    ) -> None:
        conductor = self.world.conductor
        seconds = max(conductor.watchdog_seconds, self.world.setup_seconds if self._is_first_step else 0.0)
        facts = self._exchange(lengths, only, error, seconds)
        self._is_first_step = False
        conductor.begin_step()  # only now: if a rank called something else, no rank counts this step
        plan, error = look(self.world.rank, "planning", lambda: self._checked_plan(facts), PlanError)
        digests = self.world.start_gathering(pack_shared(plan.digest if plan else b"", error), "comparison of plans")
        if plan is None:  # the others may have a plan, and be at work
            conductor.wait(digests.done, "comparison of plans", seconds=seconds, needs_all=True)
            self._compare(digests.payloads)
        assert plan is not None  # _compare raises for a rank without one
        if self.config.debug:
            self.transport.start_log()
        run = self._new_run(
            self._run_type(plan, only, timeline, source),
            plan,
            source,
            only=only,
            timed=timeline is not None,
            on_progress=partial(conductor.note, seconds=seconds),
            on_progress_made=conductor.count_op,
            on_done=on_done,
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
            if run.own_finished == run.num_own and not future.done() and not self.config.debug and timeline is None:
                told = self._resolve(run, future)
            return done and compared

        try:
            conductor.ask_patience(seconds)
            conductor.wait(ready, f"step {conductor.step}", seconds=seconds)
        except FatalError:
            raise
        except PipemoeError as e:  # part of the plan has been issued here: the others wait for the rest
            raise FatalError(f"rank {self.world.rank}: {e} (in {conductor.doing})") from e
        self.issued = self.issued.plus(run.issued_seconds, len(plan.cohorts) * self.shape.num_layers)
        if timeline is not None:
            spans = [Span(op, *event.span()) for op, event in run.completed]
            run.of_caller(lambda: timeline.take(spans, run.issue_seconds))
        if self.config.debug:
            self._check_issued(plan, only, seconds)
        conductor.ask_patience(0.0)
        if not future.done():
            self._resolve(run, future)
        elif (
            run.failure is not None and run.failure is not told
        ):  # a caller's function raised after this rank's part was done
            self.announce(run.failure)

    def _new_run(self, run_type: Callable[..., Run], plan: Plan, source: Source, **options: Any) -> Run:
        return run_type(
            plan,
            self.world.rank,
            self.world.lanes,
            self.transport,
            self._workspace,
            self.wire,
            self.experts_with_free_sms[plan.sms_left],
            source,
            **options,
        )

    def plan_round(self, slot: int, lengths: tuple[tuple[int, ...], ...]) -> Plan:
        """The plan of a round: one cohort, in this slot. lengths: of every rank's chunks, in tokens."""
        facts = Facts(lengths)
        cohort = [Microbatch(rank, 0, tokens) for rank, tokens in enumerate(facts.tokens) if tokens]
        found = make_plan(facts, self.shape, self.config, self.cost, [cohort], first_slot=slot)
        if self.config.debug:
            verify(found, row_bytes=self.wire.row_bytes, room=self.world.block_room)
        return found

    def in_compute_lanes(self, work: Callable[[int], None], doing: str) -> None:
        """Run set-up work of each slot (its number) in the slot's compute lane, and wait for it."""
        conductor, lanes = self.world.conductor, self.world.lanes

        def task() -> None:
            events = [lanes.slots[slot].compute.submit(partial(work, slot)) for slot in range(self.config.max_slots)]
            conductor.wait(lambda: all(event.done() for event in events), doing, seconds=self.world.setup_seconds)

        conductor.call(task)

    def new_round(self, plan: Plan, source: Source, **options: Any) -> Run:
        """A run of `plan_round`'s plan. Runs of several slots may be under way at once, one in each."""
        if self._shared is not None:
            from pipemoe.runtime.shared_run import SharedRun

            return self._new_run(SharedRun, plan, source, **options)
        return self._new_run(Run, plan, source, **options)

    def _resolve(self, run: Run, future: Future) -> BaseException | None:
        """Resolve the caller's future; returns the step's failure, if any."""
        failure = run.failure
        if failure is None:
            settle(future, time.perf_counter())
        else:
            settle(future, error=self.announce(failure))
        return failure

    def announce(self, failure: BaseException) -> ModelError:
        """Let every rank hear, at the next step of any runtime, that model code has failed on this one."""
        error = ModelError(f"rank {self.world.rank}: model code raised {describe(failure)}")
        error.__cause__ = failure
        self.world.announce(error)
        return error

    def _run_type(self, plan: Plan, only: Only, timeline: Timeline | None, source: Source) -> Callable[..., Run]:
        """What runs a step: over memory that ranks share; from tapes where that is possible."""
        if self._shared is not None:
            from pipemoe.runtime.shared_run import SharedRun

            return SharedRun
        tapes = self._tapes if self.plays_tapes else None
        if tapes is None or not plan.cohorts or timeline is not None or only != Only():
            return Run
        from pipemoe.runtime.taped_run import TapedRun

        return partial(TapedRun, tapes=tapes) if source.keeps_tensors else Run

    def _exchange(self, lengths: tuple[int, ...], only: Only, error: PipemoeError | None, seconds: float) -> Facts:
        world = self.world
        announced = world.take_announced()
        # If every rank's caller has already seen its own misuse, none needs to hear of it again: the step goes on.
        is_known = error is None and announced is not None and isinstance(announced.__cause__, InputError)
        error = announced or error
        doing = f"exchange of step {world.conductor.step + 1}"
        left_out = (not only.computation) + 2 * (not only.communication)
        message = encode_step(
            self.fingerprint, lengths if error is None or is_known else (), error, is_known=is_known, left_out=left_out
        )
        gathering = world.start_gathering(message, doing)
        world.conductor.wait(gathering.done, doing, seconds=seconds, needs_all=True)
        return decode_step(gathering.payloads)

    def plan(self, facts: Facts) -> Plan:
        """The plan for `facts`; the latest plans are remembered."""
        found = self._plans.get(facts)
        if found is None:
            found = make_plan(facts, self.shape, self.config, self.cost)
            self._plans[facts] = found
            if len(self._plans) > _CACHED_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(facts)
        return found

    def _checked_plan(self, facts: Facts) -> Plan:
        plan = self.plan(facts)
        if self.config.debug:
            verify(plan, row_bytes=self.wire.row_bytes, room=self.world.block_room)
        return plan

    def _compare(self, told: list[bytes]) -> None:
        """Different plans would hang or corrupt the collectives: too late for a mild error, as long as some rank has
        one. told: each rank's plan's digest, or why it has no plan.
        """
        mine = self.world.rank
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

    def _check_issued(self, plan: Plan, only: Only, seconds: float) -> None:
        """Compare the collectives that every rank has issued with the plan (debug)."""
        log = self.transport.take_log()
        doing = "comparison of the ranks' logs"
        gathering = self.world.start_gathering(json.dumps(log).encode(), doing)
        self.world.conductor.wait(gathering.done, doing, seconds=seconds, needs_all=True)
        if only.communication and self.world.size > 1:
            issues = [[Issue(*entry) for entry in json.loads(p)] for p in gathering.payloads]
            try:
                verify(plan, row_bytes=self.wire.row_bytes, sum_bytes=self.combine_dtype.itemsize, issues=issues)
            except PlanError as error:  # all ranks have the same logs
                raise shared(error) from None
