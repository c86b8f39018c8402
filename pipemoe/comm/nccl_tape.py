"""NCCL's calls by their C addresses: what NcclTransport does, written onto a tape instead of done."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipemoe_kernels.launch.tape import NotRecordable

if TYPE_CHECKING:
    from pipemoe_kernels.launch.tape import Tape

_FUNCTIONS = (
    "ncclGroupStart",
    "ncclGroupEnd",
    "ncclBroadcast",
    "ncclReduce",
    "ncclAllGather",
    "ncclReduceScatter",
)


@cache
def functions(version: int) -> dict[str, tuple[str, int]]:
    """Names and addresses in the library that cupy calls, which is of this version. Raises NotRecordable if it cannot
    be told from others.
    """
    library = ctypes.CDLL(None)  # where the linker looks first, also for cupy
    if not hasattr(library, "ncclGetVersion"):
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = {path for line in lines if "/libnccl.so" in (path := line.split(maxsplit=5)[-1])}
        if len(paths) != 1:
            raise NotRecordable(f"{len(paths)} libraries of NCCL are loaded: {sorted(paths)}")
        library = ctypes.CDLL(paths.pop())
    found_version = ctypes.c_int()
    if library.ncclGetVersion(ctypes.byref(found_version)) or found_version.value != version:
        raise NotRecordable(f"cupy has NCCL {version}, the linker finds {found_version.value}")
    found = {}
    for name in _FUNCTIONS:
        address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        assert address is not None
        found[name] = name, address
    return found


class TapeLibrary:
    """cupy's NCCL module, for a transport that writes onto a tape."""

    def __init__(self, library: Any, tape: Tape) -> None:
        self._library, self.tape = library, tape
        self.functions = functions(library.get_version())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)  # numbers of types and operations

    def groupStart(self) -> None:  # noqa: N802  (cupy's names)
        self.tape.call(self.functions["ncclGroupStart"])

    def groupEnd(self) -> None:  # noqa: N802
        self.tape.call(self.functions["ncclGroupEnd"])

    def communicator(self, of: Any) -> TapeCommunicator:
        """For a communicator of cupy's."""
        return TapeCommunicator(self, of.comm)


class TapeCommunicator:
    """cupy's names and order of arguments."""

    def __init__(self, library: TapeLibrary, handle: int) -> None:
        self._library, self._handle = library, handle

    def _call(self, name: str, *arguments: int) -> None:
        self._library.tape.call(self._library.functions[name], *arguments)

    def bcast(self, buffer: int, count: int, kind: int, root: int, stream: int) -> None:
        self._call("ncclBroadcast", buffer, buffer, count, kind, root, self._handle, stream)

    def reduce(self, send: int, receive: int, count: int, kind: int, op: int, root: int, stream: int) -> None:
        self._call("ncclReduce", send, receive, count, kind, op, root, self._handle, stream)

    def allGather(self, send: int, receive: int, count: int, kind: int, stream: int) -> None:  # noqa: N802
        self._call("ncclAllGather", send, receive, count, kind, self._handle, stream)

    def reduceScatter(self, send: int, receive: int, count: int, kind: int, op: int, stream: int) -> None:  # noqa: N802
        self._call("ncclReduceScatter", send, receive, count, kind, op, self._handle, stream)
