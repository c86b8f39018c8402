"""The world: this process's place among the ranks, its conductor, its lanes and its transport.

`init()` starts it: MPI where a launcher started several ranks, nothing but this process otherwise.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from pipemoe.arguments import look
from pipemoe.comm.exchange import check_equal, encode_error, pack_shared, raise_first, shared, unpack_shared
from pipemoe.comm.gathering import Gathering, LocalGathering, MpiGathering
from pipemoe.comm.side_channel import SideChannel
from pipemoe.comm.transport import LocalTransport, Transport
from pipemoe.errors import ConfigError, InputError, ModelError, PipemoeError
from pipemoe.plan.room import Room
from pipemoe.runtime.conductor import Conductor
from pipemoe.runtime.lanes import Lanes, host_lanes
from pipemoe.runtime.last_words import say
from pipemoe.runtime.reserve import Reserved
from pipemoe.torch_state import no_grad_on_this_thread
from pipemoe.world import uncaught
from pipemoe.world.arguments import InitArguments, init_arguments
from pipemoe.world.departure import departure, disown_in_children
from pipemoe.world.gpu import lanes_of, runs_on_gpu
from pipemoe.world.launcher import launched
from pipemoe.world.meet import Met, meet
from pipemoe.world.warm_up import WarmUp

if TYPE_CHECKING:
    from pipemoe.comm.shared.waves import SharedWaves, WaveMemory
    from pipemoe.world.shared_host import SharedHost

_open_world: World | None = None  # of this process


class Rolling(Protocol):
    """What has the conductor for as long as it is open."""

    def leave(self, because: str) -> None:
        """The world is to be closed. because: what went wrong, in which case this must not wait for the others."""


_forks_are_watched = False


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

        self._met = met
        self.rank, self.size = (met.rank, met.size) if met else (0, 1)
        self.num_slots, self.setup_seconds = arguments.num_slots, arguments.setup_seconds
        self.block_room: Room | None = None  # of the collectives on this rank's GPU, if there are any
        self._on_gpu = on_gpu
        self.device = torch.device("cpu")
        if on_gpu:
            self.device = torch.device("cuda", (met.local_rank if met else 0) % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.transport: Transport = LocalTransport()
        self.lanes: Any  # Lanes, or HostLanes
        self.shared: SharedHost | None = None  # ranks of this host that share memory
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
        try:
            if met is not None:
                self.conductor.call(lambda: self._meet(error))
            if met is not None:
                self.conductor.call(self._connect)
            else:
                self.lanes = self._own_lanes()
        except BaseException as error:
            self._dismantle(uncaught.reason(error))
            raise
        atexit.register(self._close)

    def _set_up_thread(self) -> None:
        import torch

        no_grad_on_this_thread()
        if self._on_gpu:
            torch.cuda.set_device(self.device)

    def _meet(self, error: PipemoeError | None) -> None:
        """Runs on the conductor's thread, as do the methods below. The side channel comes first, to watch the rest."""
        self._open_side_channel()
        self._raise_on_all(error, "looking at the arguments of init")
        settings = {"num_slots": str(self.num_slots), "device": self.device.type}
        check_equal(
            [json.loads(p) for p in self._exchange(json.dumps(settings).encode(), "comparing the arguments of init")]
        )

    def _own_lanes(self) -> Lanes:
        if self._on_gpu:
            return lanes_of(self.device, self.num_slots, alone=self.size == 1)
        return host_lanes(self.num_slots, self.conductor.wake.set)

    def _connect(self) -> None:
        if not self._on_gpu and self._shares_memory():
            return
        self.lanes = self._own_lanes()
        self.transport = self._nccl_transport() if self._on_gpu else self._mpi_transport()
        self.conductor.watch_transport(self.transport)
        self._warm_up()

    def _shares_memory(self) -> bool:
        """Let the ranks share memory, if they are all of one host, the system allows it, and the user too."""
        from pipemoe.comm.shared.memory import refusal
        from pipemoe.world.shared_host import VARIABLE, SharedHost, wanted_transport

        assert self._met is not None
        error, wanted, refused = None, "", None
        try:
            wanted = wanted_transport()
            refused = None if wanted == "mpi" else refusal()
        except ConfigError as e:
            error = e
        self._raise_on_all(error, "looking at the transport of the host")
        told = [json.loads(p) for p in self._exchange(json.dumps([wanted, refused]).encode(), "choosing the transport")]
        check_equal([{VARIABLE: name} for name, _ in told])
        if wanted == "mpi":
            return False
        refused = next((f"rank {rank}: {why}" for rank, (_, why) in enumerate(told) if why), None)
        if self._met.num_hosts > 1:
            refused = f"the ranks are on {self._met.num_hosts} hosts"
        try:
            if refused:
                raise ConfigError(refused)
            self.shared = SharedHost(self.rank, self.size, self.num_slots, self._exchange_texts)
        except ConfigError as e:  # the same on all ranks
            if wanted == "shared":
                raise shared(ConfigError(f"{VARIABLE} is 'shared', but {e}")) from None
            if self.rank == 0:
                say(f"pipemoe: no shared memory between the ranks, so MPI moves their rows: {e}")
            return False
        self.lanes = self.shared.lanes
        self.conductor.listen_by(self.lanes.wake)
        return True

    def _exchange_texts(self, text: str) -> list[str]:
        return [p.decode() for p in self._exchange(text.encode(), "sharing memory")]

    def new_waves(self, layout: WaveMemory) -> SharedWaves:
        """Memory for a runtime's waves, shared by all ranks. Every rank calls, with the same sizes, and all raise
        ConfigError if some rank lacks memory.
        """
        from pipemoe.comm.shared.memory import shared_by_all

        assert self.shared is not None
        memories, refused = self.conductor.call(lambda: shared_by_all(layout.num_bytes, self._exchange_texts))
        if refused:
            raise shared(ConfigError(f"{refused}; lower moe_max_num_tokens, max_tokens_per_rank or num_slots"))
        return self.shared.waves(layout, memories)

    def _open_side_channel(self) -> None:
        from mpi4py import MPI

        assert self._met is not None
        conductor = self.conductor
        error: ConfigError | None = None
        conductor.blame_peers_for(MPI.Exception)
        try:
            one_host, news = self._met.num_hosts == 1, lambda: conductor.wake.set()
            channel = SideChannel(self.rank, self.size, one_host, conductor.progress, conductor.watch, news)
        except (OSError, ConfigError) as e:
            error = e if isinstance(e, ConfigError) else ConfigError(f"no socket to hear the other ranks at: {e}")
        self._raise_on_all(error, "opening the side channel")
        host, port = channel.address()
        met = [
            p.decode().split()
            for p in self._exchange(f"{host} {port} {secrets.token_hex(16)}".encode(), "exchange of addresses")
        ]
        channel.connect([(h, int(p)) for h, p, _ in met], met[0][2], self.setup_seconds)
        conductor.hear_peers_by(channel)
        departure.keep(channel)

    def _mpi_transport(self) -> Transport:
        from pipemoe.comm.mpi import MpiTransport

        self.conductor.note("making MPI communicators", self.setup_seconds)
        assert self._met is not None
        return MpiTransport(self._met.communicators, self.num_slots)

    def _nccl_transport(self) -> Transport:
        from pipemoe.comm import nccl

        ids: list[bytes] = []
        error: PipemoeError | None = None
        try:
            self._check_nccl_settings()
        except ConfigError as e:
            error = e
        self._raise_on_all(error, "looking at NCCL's settings")
        room = self.room()
        self.block_room = room
        try:
            room.check(self.num_slots)
            library = nccl.library()
            self.conductor.blame_peers_for(library.NcclError, nccl.NcclFailed)
            if self.rank == 0:
                ids = nccl.unique_ids(2 * self.num_slots)
        except PipemoeError as e:
            error = e
        self._raise_on_all(error, "checking room for thread blocks")
        texts = self._exchange(json.dumps([i.hex() for i in ids]).encode(), "exchange of NCCL ids")
        self.conductor.note("making NCCL communicators", self.setup_seconds)
        return nccl.NcclTransport(self.rank, self.size, [bytes.fromhex(i) for i in json.loads(texts[0])])

    def _check_nccl_settings(self) -> None:
        for name, least in (("NCCL_MAX_CTAS", 1), ("NCCL_CGA_CLUSTER_SIZE", 0)):
            text = os.environ.get(name, str(least))
            if not (text.isascii() and text.isdigit() and int(text) >= least):
                raise ConfigError(
                    f"rank {self.rank}: {name} is {text!r}; it must be a whole number of at least {least}, or not set"
                )

    @property
    def ctas(self) -> int:
        """Thread blocks of a collective, each on a multiprocessor. 0 without GPUs, and for one rank."""
        return 0 if self.block_room is None else self.block_room.ctas

    def room(self) -> Room:
        """The SMs that this rank may use, and the thread blocks of all communicators on its GPU."""
        import torch

        from pipemoe.comm import nccl

        properties = torch.cuda.get_device_properties(self.device)
        num_sms = properties.multi_processor_count  # of the share, under MPS
        place = f"{socket.gethostname()} {properties.uuid}"
        gpus = [json.loads(p) for p in self._exchange(json.dumps([place, num_sms]).encode(), "exchange of GPU names")]
        sharing = Counter(place for place, _ in gpus)
        # NCCL reads the variable when a communicator is made. The same default on all ranks, whatever their GPUs.
        default = nccl.default_max_ctas(min(num_sms for _, num_sms in gpus), self.num_slots, max(sharing.values()))
        os.environ.setdefault("NCCL_MAX_CTAS", str(default))
        # Clusters of blocks would have to find neighbouring SMs that are free; kernels that leave some leave any.
        os.environ.setdefault("NCCL_CGA_CLUSTER_SIZE", "0")
        return Room(num_sms, nccl.max_ctas(), ranks_on_device=sharing[place])

    def _warm_up(self) -> None:
        import torch

        warm_up, error = None, None
        try:
            warm_up = WarmUp(self.rank, self.size, self.device)
        except (
            MemoryError,
            RuntimeError,
            torch.OutOfMemoryError,
        ) as e:  # for the host's memory torch raises a RuntimeError
            said = " ".join(str(e).split())[:300]
            error = ConfigError(
                f"rank {self.rank}: out of memory at set-up ({said}); give each rank more, or start fewer"
            )
        self._raise_on_all(error, "making room for the first use of the communicators")
        assert warm_up is not None  # or the error has been raised
        done = warm_up.start(self.transport, self.lanes)
        self.conductor.wait(done, "first use of the communicators", seconds=self.setup_seconds, needs_all=True)

    def start_gathering(self, payload: bytes, doing: str, slot: int | None = None) -> Gathering:
        """Begin a small all-gather. On the conductor's thread alone. `doing` must be the same on every rank, or all
        raise MismatchError. slot: whose round it is for, once `prepare_rounds` has been called; each slot's gatherings
        have an order of their own.
        """
        if self._met is None:
            return LocalGathering(payload)
        if self.shared is not None:
            return self.shared.start_gathering(payload, doing, slot)
        known = self._met.communicators
        comm = known.world if slot is None else known.for_rounds(self.num_slots)[slot]
        return MpiGathering(comm, payload, doing)

    def prepare_rounds(self) -> None:
        """Let `start_gathering` take a slot. Every rank calls, on the conductor's thread."""
        if self._met is not None and self.shared is None:
            self.conductor.note("making MPI communicators", self.setup_seconds)
            self._met.communicators.for_rounds(self.num_slots)

    def _exchange(self, payload: bytes, doing: str) -> list[bytes]:
        """A small all-gather on the conductor's thread. It waits up to setup_seconds."""
        gathering = self.start_gathering(payload, doing)
        self.conductor.wait(gathering.done, doing, seconds=self.setup_seconds, needs_all=True)
        return gathering.payloads

    def _raise_on_all(self, error: PipemoeError | None, doing: str) -> None:
        raise_first(self._exchange(encode_error(error), doing))

    def all_gather(self, payload: bytes, doing: str = "all_gather") -> list[bytes]:
        """Every rank's `payload`, in rank order; every rank calls. For results and set-up, not for a step's rows.

        Raises MismatchError on every rank if any rank calls something else, or gives another `doing`.
        """
        self.check_no_step_is_open()
        looked, error = look(self.rank, "payload of all_gather", lambda: (bytes(memoryview(payload)), str(doing)))
        content, doing = looked or (b"", doing if isinstance(doing, str) else "all_gather")
        texts = self.conductor.call(lambda: self._exchange(pack_shared(content, error), doing))
        return unpack_shared(texts)

    def agree(self, error: PipemoeError | None, facts: dict[str, str], doing: str) -> None:
        """Raise the first rank's error on all ranks, or MismatchError if their `facts` differ. Every rank calls."""

        def task() -> None:
            self._raise_on_all(error, doing)
            check_equal([json.loads(p) for p in self._exchange(json.dumps(facts).encode(), doing)])

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
        self.conductor.close(self._close_lanes, because=why)

    def _close_lanes(self) -> None:
        self.transport.close()
        if hasattr(self, "lanes"):
            self.lanes.close()

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
