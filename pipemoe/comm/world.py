"""The world: this process's place among the ranks, its engine, its lanes and its transport.

`init()` starts it: MPI where a launcher started several ranks, nothing but this process otherwise.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import socket
import threading
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipemoe.arguments import look
from pipemoe.comm.exchange import check_equal, encode_error, pack_shared, raise_first, unpack_shared
from pipemoe.comm.gathering import Gathering, LocalGathering, MpiGathering
from pipemoe.comm.side_channel import SideChannel
from pipemoe.comm.transport import LocalTransport, Transport, WaveSums
from pipemoe.errors import ConfigError, InputError, ModelError, PipemoeError
from pipemoe.plan.schedule import Segment, Wave
from pipemoe.plan.verify import Room
from pipemoe.runtime.engine import Engine
from pipemoe.runtime.lanes import Lanes, host_lanes, stream_lanes
from pipemoe.torch_state import no_grad_on_this_thread

if TYPE_CHECKING:
    import torch

_WARM_UP_ROWS, _WARM_UP_WIDTH = (1, 4096), 256  # one row, and a megabyte: NCCL's protocols differ by size

# Variables by which launchers tell a process how many ranks there are.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
# MPICH's default schedules take a poll per round, and a poll is late on a rank that computes; its trees need fewer rounds.
_MPICH_TREES = ("MPIR_CVAR_IREDUCE_INTRA_ALGORITHM", "MPIR_CVAR_IBCAST_INTRA_ALGORITHM")

_open_world: World | None = None  # of this process


def init(
    device: str = "auto",
    *,
    num_slots: int | None = None,
    watchdog_seconds: float = 60.0,
    setup_seconds: float = 600.0,
    grace_seconds: float = 5.0,
) -> World:
    """Start this rank and meet the others; every rank calls it, with the same arguments. Again only after `World.close()`.

    device: "cuda", "cpu", or "auto" (cuda where there is one). num_slots: cohorts that may be under way at once; each has a pair
    of communicators (default: PIPEMOE_NUM_SLOTS, which launch/one_gpu.sh sets, else 4). watchdog_seconds: how long an operation
    may make no progress. setup_seconds: the same for what ranks may do at very different speeds, such as reading a checkpoint.
    grace_seconds: from a fatal error to the end of the process.
    Raises ConfigError when the communicators' thread blocks have no room on the GPU, the machine lacks what `device` needs, or this
    process's world is open.
    """
    global _open_world
    import torch

    if _open_world is not None:
        raise ConfigError(f"rank {_open_world.rank}: pipemoe.init() has been called, and a process has one world; use that, or close() it first")
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; it must be 'auto', 'cpu' or 'cuda'")
    num_slots = _default_slots() if num_slots is None else num_slots
    if num_slots < 1:
        raise ConfigError(f"num_slots is {num_slots}; it must be at least 1")
    if device != "cpu":
        _prepare_cuda(num_slots)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no GPU here; `pipemoe doctor` says why")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        _check_queues(num_slots)
    launched = max(int(os.environ.get(name, 1)) for name in _SIZE_VARIABLES)
    comm = _mpi(launched) if launched > 1 else None
    _open_world = World(comm, on_gpu, num_slots, watchdog_seconds, setup_seconds, grace_seconds)
    return _open_world


def _default_slots() -> int:
    text = os.environ.get("PIPEMOE_NUM_SLOTS", "4")
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"PIPEMOE_NUM_SLOTS is {text!r}; it must be a whole number of at least 1")
    return int(text)


def _prepare_cuda(num_slots: int) -> None:
    """Settings that CUDA reads when it starts.

    A kernel loaded at its first launch may wait for all that runs on the GPU, also for a collective that waits for this very
    kernel; so everything is loaded at the start. Streams that share a hardware queue may wait for one another.
    """
    import torch

    if torch.cuda.is_initialized() and os.environ.get("CUDA_MODULE_LOADING") != "EAGER":
        warnings.warn("CUDA was started before pipemoe.init(); set CUDA_MODULE_LOADING=EAGER before, or cohorts may block one another", stacklevel=3)
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    # NCCL sets the stack size of its kernels at once, instead of having CUDA rearrange memory when one is first launched.
    os.environ.setdefault("NCCL_SET_STACK_SIZE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "16" if _queues(num_slots) <= 16 else "32")


def _queues(num_slots: int) -> int:
    """Hardware queues so that no stream shares one: three lanes a slot, a stream of NCCL's own for each of its communicators."""
    return 5 * num_slots + 2


def _check_queues(num_slots: int) -> None:
    needed, found = _queues(num_slots), int(os.environ["CUDA_DEVICE_MAX_CONNECTIONS"])
    if found < needed:
        raise ConfigError(
            f"{num_slots} slots need {needed} hardware queues, but CUDA_DEVICE_MAX_CONNECTIONS is {found}; raise it (at most 32) or lower num_slots"
        )


def _mpi(launched: int) -> Any:
    for name in _MPICH_TREES:  # read when MPI starts
        os.environ.setdefault(name, "tsp_tree")
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(f"a launcher started several ranks, but mpi4py cannot be imported ({error}); install pipemoe[mpi]") from None
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise ConfigError("MPI was started without thread support; let mpi4py initialise it, with its default thread level")
    if MPI.COMM_WORLD.Get_size() != launched:
        raise ConfigError(
            f"the launcher started {launched} ranks, but the MPI that mpi4py loads sees {MPI.COMM_WORLD.Get_size()}:"
            " it is not the launcher's; `pipemoe doctor` shows both"
        )
    return MPI.COMM_WORLD.Dup()


def world_of(world: Any) -> tuple[World, InputError | None]:
    """`world`; or the one that is open in this process, whose other ranks are to hear of the error, if that is none."""
    if isinstance(world, World):
        return world, None
    error = InputError(f"world is a {type(world).__name__}; it must be what pipemoe.init() has returned")
    if _open_world is None:
        raise error
    return _open_world, error


class World:
    """`rank` of `size`, on `device`; made by `init`. At most one is open in a process: two engines must not use MPI at once."""

    def __init__(self, comm: Any, on_gpu: bool, num_slots: int, watchdog_seconds: float, setup_seconds: float, grace_seconds: float) -> None:
        import torch

        self._comm = comm
        self.rank, self.size = (comm.Get_rank(), comm.Get_size()) if comm else (0, 1)
        self.num_slots, self.setup_seconds = num_slots, setup_seconds
        self.block_room: Room | None = None  # of the collectives on this rank's GPU, if there are any
        self._on_gpu = on_gpu
        self.device = torch.device("cpu")
        local_rank = 0
        if comm is not None:
            from mpi4py import MPI

            local_rank = comm.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
        if on_gpu:
            self.device = torch.device("cuda", local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        self.engine = Engine(self.rank, watchdog_seconds=watchdog_seconds, grace_seconds=grace_seconds, set_up_thread=self._set_up_thread)
        self.engine.moves_transfers = not on_gpu
        self.lanes: Lanes = stream_lanes(self.device, num_slots) if on_gpu else host_lanes(num_slots, self.engine.wake.set)
        self.transport: Transport = LocalTransport()
        self.reserved_bytes: dict[tuple[str, int], int] = {}  # by lane and slot, the most that a runtime has reserved
        self.reserved_callers: dict[torch.cuda.Stream, int] = {}  # the same, by stream of a caller
        self.num_runtimes = 0  # made so far; the ranks make the same ones in the same order
        self.announced: ModelError | None = None  # model code that failed in the last step; every rank hears of it in the next
        self.threads_in_step: set[int] = set()  # of callers who give a step its rows; until they leave it, no other step begins
        self.warned: set[str] = set()  # what was said once needs no second time
        self._closed = False
        self.engine.call(self._meet)
        atexit.register(self._close)

    def _set_up_thread(self) -> None:
        import torch

        no_grad_on_this_thread()
        if self._on_gpu:
            torch.cuda.set_device(self.device)

    def _meet(self) -> None:
        """On the engine's thread: side channel first, so that what follows can be watched; then the communicators."""
        if self.size > 1:
            self._open_side_channel()
            settings = {"num_slots": str(self.num_slots), "device": self.device.type}
            check_equal([json.loads(p) for p in self._exchange(json.dumps(settings).encode(), "comparing the arguments of init")])
            self.transport = self._nccl_transport() if self._on_gpu else self._mpi_transport()
            self.engine.on_failure.append(self.transport.abort)
            self.engine.health.append(self.transport.check)
            self._warm_up()

    def _open_side_channel(self) -> None:
        from mpi4py import MPI

        engine, error = self.engine, None
        engine.library_errors = (MPI.Exception,)
        hosts = self._exchange(socket.gethostname().encode(), "meeting the other ranks")
        try:
            channel = SideChannel(self.rank, self.size, len(set(hosts)) == 1, engine.progress, engine.watch)
        except (OSError, ConfigError) as e:
            error = e if isinstance(e, ConfigError) else ConfigError(f"no socket to hear the other ranks at: {e}")
        self._raise_on_all(error, "opening the side channel")
        host, port = channel.address()
        met = [p.decode().split() for p in self._exchange(f"{host} {port} {secrets.token_hex(16)}".encode(), "exchange of addresses")]
        channel.connect([(h, int(p)) for h, p, _ in met], met[0][2], self.setup_seconds)
        engine.side_channel = channel

    def _mpi_transport(self) -> Transport:
        from pipemoe.comm.mpi import MpiTransport

        self.engine.note("making MPI communicators", self.setup_seconds)
        return MpiTransport(self._comm, self.num_slots)

    def _nccl_transport(self) -> Transport:
        from pipemoe.comm import nccl

        room, error = self.room(), None
        self.block_room = room
        ids: list[bytes] = []
        try:
            room.check(self.num_slots)
            library = nccl.library()
            self.engine.library_errors += (library.NcclError, nccl.NcclFailed)
            if self.rank == 0:
                ids = nccl.unique_ids(2 * self.num_slots)
        except PipemoeError as e:
            error = e
        self._raise_on_all(error, "checking room for thread blocks")
        texts = self._exchange(json.dumps([i.hex() for i in ids]).encode(), "exchange of NCCL ids")
        self.engine.note("making NCCL communicators", self.setup_seconds)
        return nccl.NcclTransport(self.rank, self.size, [bytes.fromhex(i) for i in json.loads(texts[0])])

    @property
    def ctas(self) -> int:
        """Thread blocks of a collective, each on a multiprocessor; none where ranks use no GPU, or there is one rank."""
        return 0 if self.block_room is None else self.block_room.ctas

    def room(self) -> Room:
        """SMs that this rank may use, and thread blocks of the communicators on its GPU."""
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
        return Room(num_sms, nccl.max_ctas(), ranks_on_device=sharing[place], cluster_blocks=nccl.cluster_blocks())

    def _warm_up(self) -> None:
        """Every kind of collective on every communicator, from one root and from all, small and large: nothing is connected or
        loaded inside a step."""
        import torch

        dtypes = [torch.float32, torch.float64] + ([torch.bfloat16, torch.float16] if self._on_gpu else [])
        keep: list = []  # buffers live until the lanes are done with them
        events = []

        def tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            keep.append(torch.zeros(shape, dtype=dtype, device=self.device))
            return keep[-1]

        for num_rows in _WARM_UP_ROWS:
            everyone = Wave(tuple(Segment(r, 0, num_rows, r * num_rows) for r in range(self.size)), self.size * num_rows)
            alone = [Wave((Segment(root, 0, num_rows, 0),), num_rows) for root in range(self.size)]
            for exchange, wave in [("padded", everyone), ("broadcast", everyone), *(("broadcast", w) for w in alone)]:
                rows = tensor(torch.uint8, wave.num_rows, _WARM_UP_WIDTH)
                own = [s for s in wave.segments if s.rank == self.rank]
                cases = []
                for dtype in dtypes:
                    results = [tensor(dtype, num_rows, _WARM_UP_WIDTH) for _ in own]
                    sums = WaveSums(tensor(dtype, wave.num_rows, _WARM_UP_WIDTH), results, tensor(dtype, self.size - 1, num_rows, _WARM_UP_WIDTH))
                    cases += [(combine, sums) for combine in ("reduce", "gather")]
                if self._on_gpu:
                    torch.cuda.synchronize(self.device)  # the buffers are filled on another stream
                for slot, lanes in enumerate(self.lanes.slots):
                    events.append(lanes.dispatch.submit(lambda s=slot, e=exchange, w=wave, r=rows: self.transport.dispatch(s, 0, w, e, r)))
                    for combine, sums in cases:
                        events.append(
                            lanes.combine.submit(
                                lambda s=slot, e=exchange, w=wave, c=combine, x=sums: self.transport.combine(s, 0, w, e, c, x)
                            )
                        )

        def done() -> bool:
            self.lanes.poll()
            return all(event.done() for event in events)

        self.engine.wait(done, "first use of the communicators", seconds=self.setup_seconds, needs_all=True)

    def start_gathering(self, payload: bytes, doing: str) -> Gathering:
        """Begin a small all-gather; engine's thread only. `doing` must be the same on every rank (MismatchError otherwise)."""
        return LocalGathering(payload) if self._comm is None else MpiGathering(self._comm, payload, doing)

    def _exchange(self, payload: bytes, doing: str) -> list[bytes]:
        """A small all-gather on the engine's thread, waited for as patiently as set-up needs."""
        gathering = self.start_gathering(payload, doing)
        self.engine.wait(gathering.done, doing, seconds=self.setup_seconds, needs_all=True)
        return gathering.payloads

    def _raise_on_all(self, error: PipemoeError | None, doing: str) -> None:
        raise_first(self._exchange(encode_error(error), doing))

    def all_gather(self, payload: bytes, doing: str = "all_gather") -> list[bytes]:
        """Every rank's `payload`, in rank order; every rank calls. For results and set-up, not for a step's rows.

        Raises MismatchError, on every rank, where others call something else, or say that they are `doing` something else.
        """
        self.check_no_step_is_open()
        looked, error = look(self.rank, "payload of all_gather", lambda: (bytes(memoryview(payload)), str(doing)))
        content, doing = looked or (b"", doing if isinstance(doing, str) else "all_gather")
        texts = self.engine.call(lambda: self._exchange(pack_shared(content, error), doing))
        return unpack_shared(texts)

    def agree(self, error: PipemoeError | None, facts: dict[str, str], doing: str) -> None:
        """Every rank calls: raises the first rank's error on all of them, or MismatchError if `facts` are not the same."""
        def task() -> None:
            self._raise_on_all(error, doing)
            check_equal([json.loads(p) for p in self._exchange(json.dumps(facts).encode(), doing)])

        self.check_no_step_is_open()
        self.engine.call(task)

    def check_no_step_is_open(self) -> None:
        """Raises InputError on a thread that is inside a PipelinedMoE's step: the engine takes up nothing else before that has ended."""
        if threading.get_ident() in self.threads_in_step:
            raise InputError(f"rank {self.rank}: a step is open; leave its `with` block before the next step, call, prefill, exchange or close()")

    def close(self) -> None:
        """Finish what is under way, leave the others in peace. Called again, does nothing.

        Raises InputError on a thread that is inside a PipelinedMoE's step, which it would wait for.
        """
        if not self._closed:
            self.check_no_step_is_open()
        self._close()

    def _close(self) -> None:
        """At the end of the process also inside a step: nobody goes on with that."""
        global _open_world
        if self._closed or self.engine.failure is not None:
            return
        self._closed = True
        self.engine.close(self.transport.close)
        self.lanes.close()
        if self.engine.side_channel is not None:
            self.engine.side_channel.close()
        if _open_world is self:
            _open_world = None

    def __enter__(self) -> World:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
