"""The world: this process's place among the ranks, and what it has for all models: conductor, lanes, transport.

`init()` starts it: MPI where a launcher started several ranks, nothing but this process otherwise.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

from pipemoe.arguments import look
from pipemoe.comm.exchange import check_equal, pack_shared, shared, unpack_shared
from pipemoe.comm.gathering import Gathering
from pipemoe.errors import ConfigError, InputError, ModelError, PipemoeError
from pipemoe.runtime.conductor import Conductor
from pipemoe.runtime.last_words import say
from pipemoe.runtime.reserve import Reserved
from pipemoe.torch_state import no_grad_on_this_thread
from pipemoe.world import uncaught
from pipemoe.world.arguments import InitArguments, init_arguments
from pipemoe.world.connection import Connection
from pipemoe.world.departure import departure, disown_in_children
from pipemoe.world.gpu import runs_on_gpu
from pipemoe.world.launcher import launched
from pipemoe.world.meet import Met, meet

if TYPE_CHECKING:
    from pipemoe.comm.mpi import HostLinks
    from pipemoe.comm.shared.waves import SharedWaves, WaveMemory
    from pipemoe.comm.transport import Transport

_open_world: World | None = None  # of this process
_forks_are_watched = False


class Rolling(Protocol):
    """Whatever keeps the conductor busy for as long as it is open, as an engine does."""

    def leave(self, because: str) -> None:
        """The world is to be closed. because: what went wrong, if anything; then this must not wait for the others."""


def init(
    device: str = "auto",
    *,
    num_slots: int | None = None,
    watchdog_seconds: float = 60.0,
    setup_seconds: float = 600.0,
    grace_seconds: float = 5.0,
) -> World:
    """Start this rank and meet the others. Every rank calls it, with the same arguments; again only after
    `World.close()`.

    device: "cuda", "cpu", or "auto" (cuda if there is a GPU). num_slots: cohorts that may be under way at once; each
    has a pair of communicators (default: PIPEMOE_NUM_SLOTS, which launch/one_gpu.sh sets, else 4). watchdog_seconds:
    how long an operation may make no progress. setup_seconds: the same for set-up work that may take ranks very
    different times, such as reading a checkpoint. grace_seconds: from a fatal error to the end of the process. All are
    numbers of seconds above 0; grace_seconds may be 0.

    While other ranks have not called, it says so every few seconds on standard error. After setup_seconds the process
    ends with status 70.

    Raises ConfigError, on every rank, if any rank's argument is wrong; if the launcher does not speak MPI; if the
    communicators' thread blocks have no room on the GPU; if the machine lacks memory, or what `device` needs; if this
    process, or the one that it was forked from, has a world open. Raises MismatchError if the ranks' arguments differ.
    """
    global _open_world
    departure.check_process()
    if _open_world is not None:
        raise ConfigError(
            f"rank {_open_world.rank}: pipemoe.init() has been called, and a process has one world; use that, or "
            "close() it first"
        )
    departure.join()
    arguments, on_gpu, error = InitArguments(), False, None
    try:
        arguments = init_arguments(device, num_slots, watchdog_seconds, setup_seconds, grace_seconds)
        on_gpu = runs_on_gpu(arguments)
    except ConfigError as e:
        error = e
    launch = launched(os.environ)
    _watch_forks()
    uncaught.install()
    met = None
    if launch.num_ranks != 1:
        met = meet(launch, arguments)
    if met is None and error is not None:
        raise error
    _open_world = World(met, arguments, on_gpu, error)
    return _open_world


def _watch_forks() -> None:
    global _forks_are_watched
    if not _forks_are_watched:
        disown_in_children(lambda: _open_world)
        _forks_are_watched = True


def world_of(world: Any) -> tuple[World, PipemoeError | None]:
    """`world` and no error. If `world` is not a World: the open one, and the error that its other ranks must hear."""
    if isinstance(world, World):
        return world, None
    error = InputError(f"world is a {type(world).__name__}; it must be what pipemoe.init() has returned")
    if _open_world is None:
        raise error
    return _open_world, error


class World:
    """Rank `rank` of `size`, on `device`; made by `init`. A process has one open at most: two conductors must not use
    MPI at once.
    """

    def __init__(self, met: Met | None, arguments: InitArguments, on_gpu: bool, error: PipemoeError | None) -> None:
        """error: why this rank cannot go on; the others must hear of it."""
        import torch

        self.rank, self.size = (met.rank, met.size) if met else (0, 1)
        self.num_slots, self.setup_seconds = arguments.num_slots, arguments.setup_seconds
        self._on_gpu = on_gpu
        self.device = torch.device("cpu")
        if on_gpu:
            self.device = torch.device("cuda", (met.local_rank if met else 0) % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.reserved = Reserved()  # by all runtimes
        self._num_runtimes = 0
        self._announced: ModelError | None = None
        self._threads_in_step: set[int] = set()
        self._rolling: Rolling | None = None  # whoever has the conductor for as long as it likes
        self._warned: set[str] = set()
        self._closed = False
        self.conductor = Conductor(
            self.rank,
            watchdog_seconds=arguments.watchdog_seconds,
            grace_seconds=arguments.grace_seconds,
            moves_transfers=not on_gpu,
            set_up_thread=self._set_up_thread,
        )
        self._connection = Connection(met, self.num_slots, self.setup_seconds, self.device, self.conductor)
        try:
            if met is None:
                self._connection.connect()
            else:
                self.conductor.call(lambda: self._connection.meet(error))
                self.conductor.call(self._connection.connect)
        except BaseException as error:
            self._dismantle(uncaught.reason(error))
            raise
        self.transport, self.lanes = self._connection.transport, self._connection.lanes
        self.shared = self._connection.shared  # ranks of this host that share memory
        self.shared_by_all, self.hosts = self._connection.shared_by_all, self._connection.hosts
        self.block_room = self._connection.block_room  # of the collectives on this rank's GPU, if there are any
        atexit.register(self._close)

    def _set_up_thread(self) -> None:
        import torch

        no_grad_on_this_thread()
        if self._on_gpu:
            torch.cuda.set_device(self.device)

    def new_waves(self, layout: WaveMemory) -> SharedWaves:
        """Memory for a runtime's waves, shared by the ranks of each host. Every rank calls, with the same sizes, and
        all raise ConfigError if some rank lacks memory.
        """
        known = self.shared
        assert known is not None
        waves, refused = self.conductor.call(lambda: known.new_waves(layout))
        if refused:
            raise shared(ConfigError(f"{refused}; lower moe_max_num_tokens, max_tokens_per_rank or num_slots"))
        return waves

    def host_links(self) -> HostLinks | None:
        """To ranks of other hosts, if ranks share memory and there are other hosts. Every rank calls."""
        if self.shared is None or self.shared_by_all is not None:
            return None
        return self.conductor.call(self._connection.host_links)

    def mpi_transport(self) -> Transport:
        """For a runtime whose rows find no shared memory. Every rank calls."""
        return self.conductor.call(self._connection.mpi_transport)

    @property
    def ctas(self) -> int:
        """Thread blocks of a collective, each on a multiprocessor. 0 without GPUs, and for one rank."""
        return 0 if self.block_room is None else self.block_room.ctas

    def start_gathering(self, payload: bytes, doing: str, slot: int | None = None) -> Gathering:
        """Begin a small all-gather. On the conductor's thread alone. `doing` must be the same on every rank, or all
        raise MismatchError. slot: whose round it is for, once `prepare_rounds` has been called; each slot's gatherings
        have an order of their own.
        """
        return self._connection.start_gathering(payload, doing, slot)

    def prepare_rounds(self) -> None:
        """Let `start_gathering` take a slot. Every rank calls, on the conductor's thread."""
        self._connection.prepare_rounds()

    def all_gather(self, payload: bytes, doing: str = "all_gather") -> list[bytes]:
        """Every rank's `payload`, in rank order; every rank calls. For results and set-up, not for a step's rows.

        Raises MismatchError on every rank if any rank calls something else, or gives another `doing`.
        """
        self.check_no_step_is_open()
        looked, error = look(self.rank, "payload of all_gather", lambda: (bytes(memoryview(payload)), str(doing)))
        content, doing = looked or (b"", doing if isinstance(doing, str) else "all_gather")
        texts = self.conductor.call(lambda: self._connection.exchange(pack_shared(content, error), doing))
        return unpack_shared(texts)

    def agree(self, error: PipemoeError | None, facts: dict[str, str], doing: str) -> None:
        """Raise the first rank's error on all ranks, or MismatchError if their `facts` differ. Every rank calls."""

        def task() -> None:
            self._connection.raise_on_all(error, doing)
            check_equal([json.loads(p) for p in self._connection.exchange(json.dumps(facts).encode(), doing)])

        self.check_no_step_is_open()
        self.conductor.call(task)

    def number_runtime(self) -> int:
        """The number of a new runtime, from 1. The ranks make the same ones in the same order."""
        self._num_runtimes += 1
        return self._num_runtimes

    def announce(self, error: ModelError) -> None:
        """Keep what model code raised in this step; every rank hears of it in the next."""
        self._announced = error

    def take_announced(self) -> ModelError | None:
        """The error that the last step has announced, if any; only once."""
        announced, self._announced = self._announced, None
        return announced

    def is_first(self, warning: str) -> bool:
        """True the first time that a warning is named, False from then on."""
        is_new = warning not in self._warned
        self._warned.add(warning)
        return is_new

    def enter_step(self) -> int:
        """This thread gives a step its rows; until it has left, it begins nothing else. Returns the thread's number."""
        thread = threading.get_ident()
        self._threads_in_step.add(thread)
        return thread

    def leave_step(self, thread: int) -> None:
        """The step that this thread has entered is over."""
        self._threads_in_step.discard(thread)

    def begin_rolling(self, rolling: Rolling) -> None:
        """From now on the conductor is busy with this, until `end_rolling`."""
        self._rolling = rolling

    def end_rolling(self) -> None:
        """The conductor is free again."""
        self._rolling = None

    def check_no_step_is_open(self) -> None:
        """Raise InputError while an Engine is open, and on a thread inside a PipelinedMoE's step: the conductor does
        nothing else till that ends.
        """
        if self._rolling is not None:
            raise InputError(
                f"rank {self.rank}: an Engine is open; close() it before a prefill, a layer's step, an exchange or a "
                "new model"
            )
        if threading.get_ident() in self._threads_in_step:
            raise InputError(
                f"rank {self.rank}: a step is open; leave its `with` block before the next step, call, prefill, "
                "exchange or close()"
            )

    def close(self) -> None:
        """Finish what is under way and leave the other ranks in peace. A second call does nothing.

        While an exception is being raised here, this tells the peers of it and returns at once, so that the exception
        is seen first. Raises InputError on a thread that is inside a PipelinedMoE's step: it would wait for that step.
        """
        if not self._closed and self._rolling is None:
            self.check_no_step_is_open()
        self._close()

    def _close(self) -> None:
        """As `close`, but also inside a step: at the end of the process nobody goes on with it."""
        if self._closed or self.conductor.failure is not None:
            return
        why = uncaught.reason_to_leave()
        if why and sys.exception() is not None:  # otherwise it has been printed
            say(f"pipemoe: rank {self.rank} closes its world because of {why}")
        if self._rolling is not None:
            self._rolling.leave(why)
        self._dismantle(why)
        if sys.exception() is None:
            uncaught.remove()

    def _dismantle(self, why: str) -> None:
        """Leave the others and close everything but the side channel, which the end of the process needs."""
        global _open_world
        self._closed = True
        if _open_world is self:
            _open_world = None
        atexit.unregister(self._close)
        if self.conductor.failure is not None:
            return
        departure.leaves(self.conductor)
        self.conductor.close(self._connection.close, because=why)

    def disown(self, parent: int) -> None:
        """In a forked process: every call raises InputError, and nothing disturbs the parent, whose world it is."""
        global _open_world
        _open_world, self._closed = None, True
        atexit.unregister(self._close)
        self.conductor.disown(
            InputError(
                f"rank {self.rank}: this process was forked from process {parent}, whose world it is; only that can "
                "use it."
                " Start workers before pipemoe.init(), or by subprocess or multiprocessing's 'spawn'"
            )
        )

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
