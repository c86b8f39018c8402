"""A kernel: a Numba function compiled once per device, launched by our own launcher.

Numba only compiles (to PTX), nvJitLink makes the cubin, the driver loads it, and `Kernel.launch` packs the arguments
(`Kernel.pack`: once, for many launches). In the simulator the same call runs the function on NumPy views of CPU
tensors.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch

from pipemoe_kernels.launch import cubin_cache, driver
from pipemoe_kernels.launch.packed_launch import PackedLaunch
from pipemoe_kernels.numba_cuda import SIMULATOR, cuda, types

_log = logging.getLogger("pipemoe")
P, T = ParamSpec("P"), TypeVar("T")
INT32 = types.int32
UINT32 = types.uint32
ADDRESS = types.uint64
INT32_POINTER = types.CPointer(types.int32)
FLOAT32_POINTER = types.CPointer(types.float32)
WORD_POINTER = types.CPointer(types.uint64)
BYTE_POINTER = types.CPointer(types.uint8)


@dataclass(frozen=True, slots=True)
class Stream:
    """Where kernels go: a device and a stream of it."""

    device_index: int
    handle: int

    @staticmethod
    def current(device: torch.device) -> Stream:
        """torch's current stream on `device`; its context becomes current in a thread that has none."""
        if SIMULATOR:
            return Stream(0, 0)
        device_index = torch.cuda.current_device() if device.index is None else device.index
        return Stream(device_index, current_stream(device_index))


def current_stream(device_index: int) -> int:
    """The handle of torch's current stream on a device; its context becomes current in a thread that has none."""
    driver.enter_context(device_index)
    # torch.cuda.current_stream would take microseconds to make an object.
    return torch._C._cuda_getCurrentRawStream(device_index)


@cache
def is_hopper(device_index: int) -> bool:
    """May kernels for this device start early?"""
    return not SIMULATOR and torch.cuda.get_device_capability(device_index) == (9, 0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The call that makes a kernel, such that another process can repeat it."""

    module: str
    name: str
    arguments: tuple
    options: tuple[tuple[str, object], ...]


def kernel_factory(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that makes a Kernel, or something whose fields are kernels: it is cached, and its kernels
    know their recipe.
    """

    @cache
    @wraps(function)
    def make(*arguments: P.args, **options: P.kwargs) -> T:
        made = function(*arguments, **options)
        for kernel in kernels_in(made):
            kernel.recipe = Recipe(function.__module__, function.__name__, arguments, tuple(options.items()))
        return made

    return make


def kernels_in(made: object) -> list[Kernel]:
    """The kernels that a factory has made."""
    if isinstance(made, Kernel):
        return [made]
    parts = made if isinstance(made, tuple) else ()
    if is_dataclass(made):
        parts = tuple(getattr(made, field.name) for field in fields(made))
    return [part for part in parts if isinstance(part, Kernel)]


class Kernel:
    """`function` with parameters of the Numba types `parameters` (pointers, integers), in blocks of `threads` threads.

    shared_bytes: dynamic shared memory. hopper_only: it has instructions of sm_90a alone, and registers for
    `blocks_per_sm` blocks on a multiprocessor. The next three are for Hopper only. starts_early: its blocks may start
    before the previous kernel of the stream has ended, and must wait for that themselves (ptx/hopper.py,
    wait_for_earlier). moves_registers: its warpgroups take unequal shares of the registers (take_registers there).
    cluster: how many blocks run side by side on neighbouring multiprocessors (ptx/cluster.py). key: all constants in
    `function` that its sources do not show; with it the compiled kernel is kept on disk (cubin_cache).
    """

    def __init__(
        self,
        function: Callable,
        parameters: tuple[types.Type, ...],
        threads: int,
        *,
        shared_bytes: int = 0,
        hopper_only: bool = False,
        starts_early: bool = False,
        blocks_per_sm: int = 1,
        moves_registers: bool = False,
        cluster: int = 1,
        key: tuple[object, ...] | None = None,
    ):
        self.name = function.__name__
        self.function = function
        self.parameters = parameters
        self.threads = threads
        self.shared_bytes = shared_bytes
        self.hopper_only = hopper_only
        self.starts_early = starts_early
        self.blocks_per_sm = blocks_per_sm
        self.moves_registers = moves_registers
        self.cluster = cluster
        self.key = key
        self.recipe: Recipe | None = None
        self._handles = {}
        self._simulated = cuda.jit(function) if SIMULATOR else None

    def compile_ptx(self, cc: tuple[int, int]) -> str:
        """PTX for compute capability `cc`; needs no GPU."""
        return self._compiled(cc, "ptx")

    def _compiled(self, cc: tuple[int, int], output: str) -> str | bytes:
        bounds = self.threads
        if self.hopper_only:
            cc, bounds = (9, 0, "a"), (self.threads, self.blocks_per_sm)
        settings = {"device": False, "abi": "numba", "cc": cc, "launch_bounds": bounds, "output": output}
        collects = gc.isenabled()
        gc.disable()  # a compiler makes millions of objects; the garbage collector would take an eighth of its time
        try:
            return cuda.compile(self.function, self.parameters, **settings)[0]
        finally:
            if collects:
                gc.enable()

    def load(self, device_index: int) -> None:
        """Compile and load for a device unless that is done; takes seconds the first time."""
        if SIMULATOR or device_index in self._handles:
            return
        cc = torch.cuda.get_device_capability(device_index)
        key = self.kept_key(cc)
        if key is None:
            self._handles[device_index] = self._function(self.build(cc, self._arch(cc)), device_index)
            return
        kept = cubin_cache.load(key)
        if kept and self._load(kept, device_index):
            return
        built = self._built_by_one(cc, key, kept)
        self._handles[device_index] = self._function(built, device_index)

    def kept_key(self, cc: tuple[int, int]) -> tuple[object, ...] | None:
        """The kernel's key in cubin_cache. None: it is not kept."""
        return self.key and (self.name, *self.key, self.parameters, self.threads, self.blocks_per_sm, self._arch(cc))

    def _arch(self, cc: tuple[int, int]) -> str:
        return "sm_90a" if self.hopper_only else f"sm_{cc[0]}{cc[1]}"

    def _built_by_one(
        self, cc: tuple[int, int], key: tuple[object, ...], refused: tuple[str, bytes] | None
    ) -> tuple[str, bytes]:
        """Built here, or by a process that is at it. refused: what the driver did not load."""
        with cubin_cache.turn(key, waits=True):
            kept = cubin_cache.load(key)
            if kept is None or kept == refused:
                kept = self.build(cc, self._arch(cc))
                cubin_cache.store(key, *kept)
        return kept

    def build_ahead(self, cc: tuple[int, int]) -> None:
        """Build it for the disk, unless it is there or a process is at it; needs no GPU."""
        key = self.kept_key(cc)
        assert key is not None
        with cubin_cache.turn(key, waits=False) as mine:
            if mine and cubin_cache.load(key) is None:
                cubin_cache.store(key, *self.build(cc, self._arch(cc)))

    def _load(self, kept: tuple[str, bytes], device_index: int) -> bool:
        """Load what was kept on disk; False if the driver refuses it, and it has to be built."""
        try:
            self._handles[device_index] = self._function(kept, device_index)
        except Exception as error:  # noqa: BLE001  (a new build shows whether it is the kept file's fault)
            _log.warning("%s as kept on disk cannot be loaded (%s); it is compiled anew", self.name, error)
            return False
        return True

    def _function(self, code: tuple[str, bytes], device_index: int) -> ctypes.c_void_p:
        entry, cubin = code
        return driver.load_function(cubin, entry, device_index, self.shared_bytes)

    def build(self, cc: tuple[int, int], arch: str) -> tuple[str, bytes]:
        """Entry name and cubin; needs no GPU.

        The linker takes PTX to be a part of a program, where it ignores setmaxnreg. Link-time optimisation sees the
        whole program.
        """
        from cuda.core import Linker, LinkerOptions, ObjectCode

        def linked(code: ObjectCode, **options: bool) -> bytes:
            return bytes(Linker(code, options=LinkerOptions(arch=arch, **options)).link("cubin").code)

        if self.moves_registers:
            try:
                cubin = linked(ObjectCode.from_ltoir(self._compiled(cc, "ltoir")), link_time_optimization=True)
                # There are also sections of subroutines, such as division; the kernel's has a mangled name.
                return re.search(rb"\.text\.(_Z[\w$]+)\0", cubin).group(1).decode(), cubin
            except Exception as error:  # noqa: BLE001  (such as a linker older than the compiler)
                warnings.warn(f"{self.name} cannot be linked whole, and will be slow: {error}", stacklevel=3)
        ptx = self.compile_ptx(cc)
        entry = re.search(r"\.entry\s+([\w$]+)", ptx).group(1)
        return entry, linked(ObjectCode.from_ptx(ptx.encode()))

    def pack(self, device_index: int, *arguments: torch.Tensor | int, may_start_early: bool = True) -> PackedLaunch:
        """A launch with these arguments to use again and again; tensors are passed as their first element's address.

        The tensors are not kept: whoever keeps the launch keeps them. Compiles and loads the kernel. may_start_early:
        False makes a kernel that `starts_early` wait in the stream, so that its blocks take no multiprocessors
        meanwhile.
        """
        self.load(device_index)
        values = [a if isinstance(a, int) else a.data_ptr() for a in arguments]
        config = driver.launch_config(
            self.threads, self.shared_bytes, self.starts_early and may_start_early, self.cluster
        )
        return PackedLaunch(self._handles[device_index], config, values)

    def launch(
        self, stream: Stream, grid: tuple[int, int], *arguments: torch.Tensor | int, may_start_early: bool = True
    ) -> None:
        """Enqueue on `stream`; tensors are passed as their first element's address, and are not checked here.
        may_start_early: as of pack.
        """
        if self._simulated is not None:
            self._simulated[grid, self.threads, 0, self.shared_bytes](
                *map(_simulator_argument, self.parameters, arguments)
            )
            return
        self.pack(stream.device_index, *arguments, may_start_early=may_start_early)(stream.handle, *grid)

    def index_of(self, name: str) -> int:
        """The index of the parameter `name` among the arguments."""
        code = self.function.__code__
        return code.co_varnames[: code.co_argcount].index(name)


def _simulator_argument(parameter: types.Type, argument: torch.Tensor | int):
    """For a pointer parameter the flat rest of the tensor's storage, in the pointer's number format."""
    if isinstance(argument, int):
        return np.int32(argument)
    start = argument.storage_offset() * argument.element_size()
    stored = torch.tensor([], dtype=torch.uint8).set_(argument.untyped_storage())
    data = stored.numpy()[start:]
    dtype = np.dtype(str(parameter.dtype))
    return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)
