"""The runtime: one model's experts and workspace on this rank, and the steps that run through them."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pipemoe.arguments import look
from pipemoe.config import Config
from pipemoe.errors import ConfigError, ModelError, PipemoeError, describe
from pipemoe.plan.clock.sms import possible_sms_left
from pipemoe.plan.cost.dimensions import dimensions_of_shape
from pipemoe.plan.schedule import ModelShape, Op, Plan
from pipemoe.runtime.costs import runtime_cost
from pipemoe.runtime.last_words import say
from pipemoe.runtime.plans import CACHED_PLANS, Plans, compile_on_hosts
from pipemoe.runtime.reserve import lack_of_memory_told
from pipemoe.runtime.run import Only, Run
from pipemoe.runtime.set_up import SetUp
from pipemoe.runtime.source import Source, SourceTraits
from pipemoe.runtime.step import Step, StepArguments, step_arguments
from pipemoe.runtime.whole_run import WholeRun, is_one_piece
from pipemoe.runtime.workspace import shared_layout
from pipemoe.trace import Timeline
from pipemoe.version import __version__
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.shared.waves import SharedWaves
    from pipemoe.runtime.played_plan import PlayedPlan
    from pipemoe.world.shared_host import SharedHost
    from pipemoe.world.world import World

_WATCH_SECONDS = 0.25  # how often a waiting caller checks the conductor
AnyRun = TypeVar("AnyRun", bound=Run | WholeRun)


class Issued(NamedTuple):
    """What issuing operations has cost so far, summed over all steps.

    seconds: of the conductor's thread. layers: each counts once for every cohort.
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
        self.cost, is_tuned, self.cost_subject, error = runtime_cost(
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
        compile_on_hosts(world, shape, self.config, self.cost)
        self.transport: Any = world.transport
        self.lanes: Any = world.lanes
        self.polls = False  # steps go on only while the conductor's thread polls what moves rows
        self._shared: SharedWaves | None = None
        self._links = world.host_links()
        if world.shared is not None:
            self._choose_host_transport(world.shared)
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
            0 if self._links is None else len(self._links.others),
        )
        _, error = world.conductor.call(lambda: look(world.rank, "setting up", set_up.run, ConfigError))
        world.agree(error, {}, "setting up the workspace")
        self._workspace = set_up.workspace
        self.experts_with_free_sms, self._tapes = set_up.experts_with_free_sms, set_up.tapes
        if traits.measured_cost is not None and not is_tuned:  # now that the model's code is warm
            self.cost = traits.measured_cost(world, self.cost, self.config.max_tokens_per_rank, self._in_first_lane)
        self.plans = Plans(shape, self.config, self.cost, self.wire.row_bytes, world.block_room, world.hosts)
        self.plays_tapes = self._tapes is not None  # else every operation is issued by Python
        self.plays_records = True  # on a host whose ranks share memory
        self._played: OrderedDict[int, PlayedPlan] = OrderedDict()
        self.issued = Issued()
        self._is_first_step = True  # the caller's code may compile in it, so it may take longer

    def _choose_host_transport(self, host: SharedHost) -> None:
        """Shared memory, or MPI if some rank cannot have as much of it."""
        from pipemoe.comm.shared.prepared import compile_for_records
        from pipemoe.runtime.host_lanes import LinkedLanes

        try:
            layout = shared_layout(self.config, self.wire, self.combine_dtype, self.world.size)
            self.transport = self._shared = self.world.new_waves(layout)
            if self._links is not None:
                self.lanes, self.polls = LinkedLanes(host.lanes), True
            else:
                compile_for_records()  # now, not inside a step
        except ConfigError as error:  # the same on all ranks
            if host.is_wanted:
                raise
            self.transport = self.world.mpi_transport()
            self.lanes, self.polls = LinkedLanes(host.lanes, for_all_rows=True), True
            if self.world.rank == 0:
                say(f"pipemoe: no shared memory for this model, so MPI moves its rows: {error}")

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
            self.world.rank,
            "arguments of a step",
            lambda: step_arguments(self.world.rank, self.config.max_tokens_per_rank, lengths, only, timeline, on_done),
        )
        step = Step(self, looked or StepArguments(), source, error or wrong, future)
        return self.world.conductor.submit(step.run, future)

    def result_of(self, future: Future) -> Any:
        """Wait for a step's result, and watch the conductor meanwhile. In a world of one rank nobody else does."""
        while not wait_for([future], _WATCH_SECONDS).done:
            self.world.conductor.watch()
        return future.result()

    def _in_first_lane(self, work: Callable[[], None]) -> None:
        """Run work in the first slot's compute lane, and wait for it."""
        self.in_compute_lanes(lambda _: work(), "measuring the model", num_slots=1)

    def in_compute_lanes(self, work: Callable[[int], None], doing: str, num_slots: int | None = None) -> None:
        """Run set-up work of each slot (its number) in the slot's compute lane, and wait for it. num_slots: None: all
        of the configuration. Raises ConfigError if memory does not suffice.
        """
        conductor, lanes = self.world.conductor, self.lanes

        def task() -> None:
            slots = range(num_slots or self.config.max_slots)
            with lack_of_memory_told(self.world.rank):
                events = [lanes.slots[slot].compute.submit(partial(work, slot)) for slot in slots]

                def done() -> bool:
                    lanes.poll()
                    return all(event.done() for event in events)

                conductor.wait(done, doing, seconds=self.world.setup_seconds)

        conductor.call(task)

    def announce(self, failure: BaseException) -> ModelError:
        """Let every rank hear, at the next step of any runtime, that model code has failed on this one."""
        error = ModelError(f"rank {self.world.rank}: model code raised {describe(failure)}")
        error.__cause__ = failure
        self.world.announce(error)
        return error

    def step_seconds(self) -> float:
        """How long the next step may make no progress."""
        return max(self.world.conductor.watchdog_seconds, self.world.setup_seconds if self._is_first_step else 0.0)

    def begin_step(self) -> None:
        """Count a step, which all ranks have agreed on."""
        self._is_first_step = False
        self.world.conductor.begin_step()

    def count_issued(self, seconds: float, num_cohorts: int) -> None:
        """Count what issuing a step's operations has taken; see Issued."""
        self.issued = self.issued.plus(seconds, num_cohorts * self.shape.num_layers)

    def new_run(self, plan: Plan, source: Source, **options: Any) -> Run | WholeRun:
        """A run of a step's plan: by compiled code where that is possible. options: see Run."""
        played = self._played_plan(plan, source, options["only"])
        if played is not None:
            from pipemoe.runtime.played_run import PlayedRun

            return self._new_run(partial(PlayedRun, played=played), plan, source, **options)
        tapes = self._tapes if self.plays_tapes and source.keeps_tensors else None
        if tapes is None or not plan.cohorts or options["timed"] or options["only"] != Only():
            return self.new_round(plan, source, **options)
        if is_one_piece(plan) and not plan.sms_left and not self.config.debug:
            work = source.whole(plan)
            if work is not None:
                return self._new_run(partial(WholeRun, work=work), plan, source, **options)
        from pipemoe.runtime.taped_run import TapedRun

        return self._new_run(partial(TapedRun, tapes=tapes), plan, source, **options)

    def _played_plan(self, plan: Plan, source: Source, only: Only) -> PlayedPlan | None:
        """The plan's records for compiled code of the host, if there are any; the latest are remembered."""
        is_plain = source.keeps_tensors and not source.has_side_work and only == Only()
        if self._shared is None or self._links is not None or not self.plays_records or not is_plain:
            return None
        from pipemoe.runtime.played_plan import PlayedPlan

        found = self._played.get(id(plan))
        if found is None:
            experts = self.experts_with_free_sms[plan.sms_left]
            found = PlayedPlan(plan, self.world.rank, self._shared, self._workspace, self.wire, experts)
            self._played[id(plan)] = found  # which keeps the plan, and so its id
            if len(self._played) > CACHED_PLANS:
                self._played.popitem(last=False)
        else:
            self._played.move_to_end(id(plan))
        return found if found.is_whole else None

    def new_round(self, plan: Plan, source: Source, **options: Any) -> Run:
        """A run of a round's plan. Runs of several slots may be under way at once, one in each."""
        if self._shared is None:
            return self._new_run(Run, plan, source, **options)
        from pipemoe.runtime.shared_run import SharedRun

        return self._new_run(partial(SharedRun, links=self._links), plan, source, **options)

    def _new_run(self, run_type: Callable[..., AnyRun], plan: Plan, source: Source, **options: Any) -> AnyRun:
        return run_type(
            plan,
            self.world.rank,
            self.lanes,
            self.transport,
            self._workspace,
            self.wire,
            self.experts_with_free_sms[plan.sms_left],
            source,
            **options,
        )
