"""Python processes that need not import: a server that has imported torch, transformers and pipemoe forks them.

Only with PIPEMOE_TEST_FORK=1: one of some hundred jobs stood still, which has not been explained.

`stand_in()` gives the path of a program that takes the place of sys.executable. It hands its arguments, environment,
folder and files to the server, whose child becomes the process that was meant. The program stays, hands signals on, and
ends as that process does; if it is killed, so is the process. A process differs from one that was really started in
this: it is a child of the server, /proc shows the server's environment, and its hashes have the server's seed.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORKS = os.environ.get("PIPEMOE_TEST_FORK") == "1"
NAME = "PIPEMOE_TEST_NAME"  # what the process is called in /proc, at most 15 characters
PRELOADED = ("torch", "numba", "pipemoe.model", "pipemoe.layer", "pipemoe.serving.engine", "pipemoe.models.loading")
PRELOADED += ("pipemoe.models.random_weights", "transformers.models.qwen3_moe.modeling_qwen3_moe", "mpi4py.run")
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGCONT)

# Started by the same Python, but without its site packages.
STAND_IN = """#!{executable} -IS
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
files = []
for name in os.listdir("/proc/self/fd"):
    try:
        os.fstat(int(name))
    except OSError:
        continue
    if int(name) != server.fileno():
        files.append(int(name))
for number in {forwarded}:
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.send(bytes([number])))
ignored = [number for number in {forwarded} if signal.getsignal(number) is signal.SIG_IGN]
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd(), files, ignored]).encode()
server.sendmsg([len(request).to_bytes(8, "little")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))])
server.sendall(request)
status = server.recv(4)
if len(status) < 4:
    os._exit(255)
status = int.from_bytes(status, "little", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


def python() -> str:
    """The path of the Python to start processes with."""
    return stand_in() if FORKS else sys.executable


@cache
def stand_in() -> str:
    """The path of the program; starts the server, which ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="pipemoe_warm."))
    atexit.register(shutil.rmtree, folder, True)
    address = str(folder / "server")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    program = folder / "python"
    program.write_text(
        STAND_IN.format(executable=sys.executable, address=address, forwarded=[int(number) for number in _FORWARDED])
    )
    program.chmod(0o755)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.warm.server", str(listener.fileno())],
        cwd=ROOT,
        env=environment,
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
    )
    listener.close()
    atexit.register(lambda: (server.kill(), server.wait()))
    return str(program)


def launched() -> dict[str, str]:
    """What launch/mpirun.sh wants in its environment, so that ranks are forked."""
    if not FORKS:
        return {}
    beside = Path(sys.executable).parent / "mpiexec"
    return {"PIPEMOE_PYTHON": stand_in()} | ({"PIPEMOE_MPIRUN": str(beside)} if beside.exists() else {})


def _serve(listener: socket.socket) -> list[str]:
    """Fork a child for each program that asks. Returns in the child, with its arguments."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    children: dict[socket.socket, tuple[int, int]] = {}  # by connection: process, and its pidfd
    while True:
        for key, _ in selector.select():
            if key.data is None:
                connection = listener.accept()[0]
                request, files = _request(connection)
                child = os.fork()
                if not child:  # objects that close their files later would close other files by then
                    for other, (_, pidfd) in children.items():
                        os.close(pidfd)
                        other.close()
                    for mine in (selector, listener, connection):
                        mine.close()
                    return _become(*request, files)
                for file in files:
                    os.close(file)
                children[connection] = child, os.pidfd_open(child)
                selector.register(connection, selectors.EVENT_READ, connection)
                selector.register(children[connection][1], selectors.EVENT_READ, connection)
                continue
            connection = key.data
            if connection not in children:
                continue
            process, pidfd = children[connection]
            if key.fileobj is connection:
                numbers = _received(connection)
                for number in numbers or [signal.SIGKILL]:
                    signal.pidfd_send_signal(pidfd, number)
                if not numbers:
                    selector.unregister(connection)
                continue
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with suppress(OSError):  # the program was killed
                connection.send(status.to_bytes(4, "little", signed=True))
            selector.unregister(pidfd)
            if connection.fileno() in {k.fd for k in selector.get_map().values()}:
                selector.unregister(connection)
            os.close(pidfd)
            connection.close()
            del children[connection]


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(64)
    except OSError:
        return b""


def _request(connection: socket.socket) -> tuple[list, list[int]]:
    """What the program sent, and its files."""
    size, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(4 * 250))
    files = array.array("i")
    for *_, data in ancillary:
        files.frombytes(data)
    request = b""
    while len(request) < int.from_bytes(size, "little"):
        request += connection.recv(1 << 16)
    return json.loads(request), list(files)


def _become(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    numbers: list[int],
    ignored: list[int],
    files: list[int],
) -> list[str]:
    """This process becomes the one that was asked for; returns its arguments. numbers: of its `files`."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(_PR_SET_NAME, environment.get(NAME, "python").encode())
    os.setsid()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    # First out of the way of the numbers that they are to have.
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for file in files]
    for file, number in zip(aside, numbers):
        os.dup2(file, number)
    for file in {*files, *aside} - {*numbers}:
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    return arguments


def _run(arguments: list[str]) -> None:
    """As the interpreter does: -m MODULE, -c CODE, or a script."""
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


def _main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    own = {str(ROOT), *os.environ["PYTHONPATH"].split(os.pathsep)}
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a child has only one of the server's threads"
    sys.path[:] = [path for path in sys.path if path not in own]
    gc.freeze()  # a child's collections would write to all memory that it shares with the server
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    _main()
