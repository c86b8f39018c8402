"""The runtime: one model's experts and workspace on this rank, and the steps that run through them."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from pipemoe.comm.exchange import check_lengths, decode_step, encode_step
from pipemoe.config import Config
from pipemoe.errors import ConfigError, FatalError, InputError, MismatchError, ModelError, PipemoeError
from pipemoe.plan.columns import most_blocks
from pipemoe.plan.dimensions import Dimensions, dimensions_of_shape
from pipemoe.plan.planner import plan as make_plan
from pipemoe.plan.projection import Issue
from pipemoe.plan.schedule import Facts, ModelShape, Op, Plan
from pipemoe.plan.sms import possible_sms_left
from pipemoe.plan.verify import verify
from pipemoe.runtime.arriving import arrival_room, arrivals_permille, arriving_experts
from pipemoe.runtime.costs import runtime_cost
from pipemoe.runtime.engine import settle
from pipemoe.runtime.lanes import Lane, SlotLanes
from pipemoe.runtime.reserve import is_out_of_memory, reserve, reserve_pinned
from pipemoe.runtime.run import Only, Run
from pipemoe.runtime.source import Source
from pipemoe.runtime.workspace import SlotBuffers, Workspace
from pipemoe.trace import Timeline
from pipemoe.wire import WireFormat

if TYPE_CHECKING:
    import torch

    from pipemoe.comm.world import World

_CACHED_PLANS = 64
_RESERVE_FACTOR = 1.5  # of a trial's activations: steps cut memory differently, and run ahead of what they free


class Runtime:
    """Experts, workspace and plans of one configuration; every rank makes one with the same arguments."""

    def __init__(
        self,
        world: World,
        shape: ModelShape,
        config: Config,
        experts: Any,
        dtype: torch.dtype,
        facts: dict[str, str],
        *,
        dimensions: Dimensions | None = None,
        trial: Callable[[], None] | None = None,
        kept_bytes: int = 0,
        prepare: Callable[[int, torch.dtype], None] | None = None,
        graph_rows: int = 0,
        graph_cuts: bool = False,
        error: PipemoeError | None = None,
    ) -> None:
        """experts: this rank's experts (see pipemoe.experts). dtype: of the hidden values that sources give. facts: whatever else must
        be equal on all ranks, by name. dimensions: of the whole model, for its cost (default: attention as of `shape`). trial: model
        code as large as an attend may run; on a GPU it is run once in every lane, and the memory it takes reserved, beside
        `kept_bytes` that model code may keep from layer to layer. prepare: run there once after that, with the number of the slot
        and the results' dtype. graph_rows: most tokens whose attention the model launches as a graph, graph_cuts: also
        where sequences are cut. error: what went wrong on this rank before it got here; raised on every rank."""
        self.world, self.shape = world, shape
        try:
            config = config.in_world(world.num_slots)
            if config.combine_blocks is not None and config.combine_blocks > most_blocks(shape.hidden):
                raise ConfigError(f"combine_blocks is {config.combine_blocks}; {shape.hidden} columns make at most {most_blocks(shape.hidden)}")
        except ConfigError as e:
            error = error or e
        self.config = config
        self.dtype = dtype
        self.wire = WireFormat(shape.hidden, shape.top_k, dtype if experts is None else experts.wire_dtype)
        self.combine_dtype = self._combine_dtype(dtype)
        if world.device.type == "cpu" and config.combine == "reduce" and self.combine_dtype.itemsize < 4:
            error = error or ConfigError(f"combine_dtype is {config.combine_dtype}, which MPI cannot reduce on the host; leave it out, or use combine='gather'")
        speed, refused = arrivals_permille(world, experts, config)
        self._has_arrivals = speed > 0 and config.may_arrive and (world.size > 1 or bool(config.arrivals))
        if config.arrivals and refused:
            error = error or ConfigError(refused)
        self.cost, self.cost_subject = runtime_cost(
            *(world, dimensions or dimensions_of_shape(shape), config, dtype, self.combine_dtype, self.wire),
            graph_rows=graph_rows,
            graph_cuts=graph_cuts,
            sliced_permille=0 if experts is None else experts.sliced_permille,
            arrivals_permille=speed if self._has_arrivals else 0,
            num_sms=None if experts is None else experts.num_sms,
        )
        sms_left: tuple[int, ...] = ()
        try:
            sms_left = possible_sms_left(config, self.cost.sms)
        except ConfigError as e:
            error = error or e
        self._compile_planner()
        world.num_runtimes += 1
        facts = self._facts(facts)
        world.agree(error, facts, "comparing configurations")
        self.fingerprint = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).digest()
        self._experts = experts
        self.experts_leaving = {num_sms: experts.leaving(num_sms) if num_sms else experts for num_sms in sms_left}  # for every plan
        self._trial, self._kept_bytes, self._prepare = trial, kept_bytes, prepare
        try:
            world.engine.call(self._set_up)
        except ConfigError as e:
            error = e
        world.agree(error, {}, "setting up the workspace")
        self._plans: OrderedDict[Facts, Plan] = OrderedDict()

    def _compile_planner(self) -> None:
        """Plan something on rank 0 first: what it compiles (half a minute, once per machine) the others find in the cache."""
        for turn in (self.world.rank == 0, self.world.rank != 0):
            if turn:
                lengths = (1, 2) if self.config.max_tokens_per_rank > 2 else (1,)
                config = replace(self.config, combine_blocks=None, num_sms=None)  # what cannot be is refused later, on all ranks
                make_plan(Facts((lengths, *((1,),) * (self.world.size - 1))), self.shape, config, self.cost)
            self.world.all_gather(b"", "compiling the planner")

    @property
    def workspace_bytes(self) -> int:
        """Memory that exchange and experts take on this rank, allocated once."""
        return self._workspace.num_bytes

    @property
    def results_dtype(self) -> torch.dtype:
        """What a source's results must be."""
        return self._workspace.results_dtype

    def _set_up(self) -> None:
        """Compile, load and allocate in the lanes that will run the experts and the model, so that no step does.

        On the engine's thread. Raises ConfigError when memory does not suffice.
        """
        import torch

        world = self.world
        try:
            self._arriving = arriving_experts(world, self._experts) if self._has_arrivals else None
            self._workspace = Workspace(self.config, self.wire, self.combine_dtype, world.size, self._experts, world.device, self._arriving)
            lanes = world.lanes.slots[: len(self._workspace.slots)]
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)  # the buffers were filled on another stream than the lanes'
                self._reserve(lanes)
                if self._prepare is not None:
                    self._in_lanes([(lane.compute, lambda s=slot: self._prepare(s, self.results_dtype)) for slot, lane in enumerate(lanes)], "preparing the model")
            warm_ups = [lambda s=slot: self._warm_up(s) for slot in self._workspace.slots]
            self._in_lanes([(lane.compute, warm_up) for lane, warm_up in zip(lanes, warm_ups)], "warming up the experts")
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                f"rank {world.rank}: out of memory at set-up ({error}); lower moe_max_num_tokens, max_tokens_per_rank or num_slots"
            ) from error

    def _warm_up(self, slot: SlotBuffers) -> None:
        self.wire.warm_up(self.world.device, self.dtype)
        self._experts.warm_up(slot.scratch, self.config.block_choices(self.shape.hidden))
        if slot.arrivals[0] is not None:
            self._arriving.warm_up(slot.arrivals[0], slot.scratch, self.config.block_choices(self.shape.hidden))

    def _reserve(self, lanes: list[SlotLanes]) -> None:
        import torch

        device, reserved, activations = self.world.device, self.world.reserved_bytes, 0
        for lane in lanes if self._trial is not None else []:  # in each: libraries keep a workspace per stream
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self._in_lanes([(lane.compute, self._trial)], "trial of the model's attention")
            activations = max(activations, torch.cuda.max_memory_allocated(device) - before)
        torch.cuda.empty_cache()  # in one piece again, and for every lane: this dropped what earlier runtimes had reserved
        for slot, buffers in enumerate(self._workspace.slots):
            needed = int(_RESERVE_FACTOR * activations) + self._kept_bytes + buffers.scratch.transient_bytes
            reserved["compute", slot] = max(reserved.get(("compute", slot), 0), needed)
            reserved["combine", slot] = max(reserved.get(("combine", slot), 0), self._workspace.sum_bytes)
        work = [
            (getattr(self.world.lanes.slots[slot], kind), lambda n=num_bytes: reserve(device, n))
            for (kind, slot), num_bytes in reserved.items()
            if num_bytes
        ]
        self._in_lanes(work, "reserving memory")
        reserve_pinned(len(lanes) + 1)

    def _in_lanes(self, work: list[tuple[Lane, Callable[[], None]]], doing: str) -> None:
        """Run set-up work in lanes and wait for it; engine's thread only."""
        events = [lane.submit(task) for lane, task in work]

        def done() -> bool:
            self.world.lanes.poll()
            return all(event.done() for event in events)

        self.world.engine.wait(done, doing, seconds=self.world.setup_seconds)

    def _combine_dtype(self, dtype: torch.dtype) -> torch.dtype:
        import torch

        if self.config.deterministic:
            return torch.float64
        if self.config.combine_dtype is not None:
            return getattr(torch, self.config.combine_dtype)
        return dtype if self.world.device.type == "cuda" else torch.float32

    def _facts(self, facts: dict[str, str]) -> dict[str, str]:
        import torch

        import pipemoe

        facts = facts | {"number of this model or PipelinedMoE": str(self.world.num_runtimes)}
        facts |= {"pipemoe": pipemoe.__version__, "torch": torch.__version__, "device": self.world.device.type}
        facts |= {"dtype": str(self.dtype), "dispatch": str(self.wire.dtype)}
        facts |= {name: str(value) for name, value in (asdict(self.config) | asdict(self.shape)).items() if name != "cost"}
        facts |= {f"cost of {name}": str(value) for name, value in asdict(self.cost).items()}
        if self.world.device.type == "cuda" and self.world.size > 1:
            from pipemoe.comm import nccl

            facts |= {"NCCL": str(nccl.library().get_version()), "NCCL_MAX_CTAS": str(nccl.max_ctas())}
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

        lengths: this rank's sequences, in tokens. error: a reason why this rank cannot take part; raised on every rank before any
        row moves. The future is resolved as soon as this rank's own cohorts have finished, and the engine goes on with the rest; with
        `timeline` or debug, when the whole plan has. Raises InputError on a thread that is inside a PipelinedMoE's step: this one would
        wait for that one, which waits for the thread.
        """
        self.world.check_no_step_is_open()
        future: Future = Future()
        return self.world.engine.submit(lambda: self._step(tuple(lengths), source, error, only, timeline, on_done, future), future)

    def _step(self, lengths, source, error, only, timeline, on_done, future) -> None:
        engine = self.world.engine
        facts = self._exchange(lengths, error)
        engine.step += 1  # not before: it must stay the same on all ranks when one of them called something else
        plan = self.plan(facts)
        if self.config.debug:
            verify(plan, row_bytes=self.wire.row_bytes, room=arrival_room(self.world, self._experts) if plan.arrivals else self.world.block_room)
            self.world.transport.log = []
        digests = self.world.start_gathering(plan.digest, "comparison of plans")
        run = Run(
            plan,
            self.world.rank,
            self.world.lanes,
            self.world.transport,
            self._workspace,
            self.wire,
            self.experts_leaving[plan.sms_left],
            source,
            arriving=self._arriving if plan.arrivals else None,
            only=only,
            timed=timeline is not None,
            on_progress=engine.note,
            on_done=lambda op: (self._count(), on_done(op)),
        )
        compared = False

        def ready() -> bool:
            nonlocal compared
            if not compared and digests.done():
                self._compare(digests.payloads)
                compared = True
            done = run.advance()
            engine.doing = run.oldest() or engine.doing  # what an error or a peer will name
            if run.own_finished == run.num_own and not future.done() and not self.config.debug and timeline is None:
                self._resolve(run, future)
            return done and compared

        try:
            engine.wait(ready, f"step {engine.step}")
        except FatalError:
            raise
        except PipemoeError as e:  # part of the plan has been issued here: the others wait for the rest
            raise FatalError(f"rank {self.world.rank}: {e} (in {engine.doing})") from e
        if timeline is not None:
            timeline.take(run.completed, run.issue_seconds)
        if self.config.debug:
            self._check_issued(plan, only)
        if not future.done():
            self._resolve(run, future)

    def _count(self) -> None:
        self.world.engine.ops_done += 1

    def _resolve(self, run: Run, future: Future) -> None:
        if run.failure is None:
            settle(future, time.perf_counter())
            return
        settle(future, error=self.announce(run.failure))

    def announce(self, failure: BaseException) -> ModelError:
        """Have every rank hear of model code that failed on this one, at the next step of any runtime."""
        error = ModelError(f"rank {self.world.rank}: model code raised {type(failure).__name__}: {failure}")
        error.__cause__ = failure
        self.world.announced = error
        return error

    def _exchange(self, lengths: tuple[int, ...], error: PipemoeError | None) -> Facts:
        world = self.world
        try:
            check_lengths(world.rank, lengths, self.config.max_tokens_per_rank)
        except PipemoeError as e:
            error = error or e
        announced, world.announced = world.announced, None
        # Misuse that every rank's own caller has been told of is no news to any of them, so the step goes on.
        is_known = error is None and announced is not None and isinstance(announced.__cause__, InputError)
        error = announced or error
        doing = f"exchange of step {world.engine.step + 1}"
        message = encode_step(self.fingerprint, lengths if error is None or is_known else (), error, is_known=is_known)
        gathering = world.start_gathering(message, doing)
        world.engine.wait(gathering.done, doing, needs_all=True)
        return decode_step(gathering.payloads)

    def plan(self, facts: Facts) -> Plan:
        """The plan for `facts`; planned once, then remembered for a while."""
        found = self._plans.get(facts)
        if found is None:
            found = make_plan(facts, self.shape, self.config, self.cost)
            self._plans[facts] = found
            if len(self._plans) > _CACHED_PLANS:
                self._plans.popitem(last=False)
        else:
            self._plans.move_to_end(facts)
        return found

    def _compare(self, digests: list[bytes]) -> None:
        """Different plans would hang or corrupt the collectives: too late for a mild error."""
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise FatalError(f"rank {self.world.rank}: rank {odd[0]} follows another plan than rank 0 (digests differ)") from MismatchError("plan digests")

    def _check_issued(self, plan: Plan, only: Only) -> None:
        """Compare what every rank really issued with the plan (debug)."""
        log, self.world.transport.log = self.world.transport.log, None
        doing = "comparison of the ranks' logs"
        gathering = self.world.start_gathering(json.dumps(log).encode(), doing)
        self.world.engine.wait(gathering.done, doing, needs_all=True)
        if only.communication and self.world.size > 1:
            issues = [[Issue(*entry) for entry in json.loads(p)] for p in gathering.payloads]
            verify(plan, row_bytes=self.wire.row_bytes, sum_bytes=self.combine_dtype.itemsize, issues=issues)
