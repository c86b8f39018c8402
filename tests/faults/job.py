"""One job of ranks.py: started by the launcher that this machine needs, and what becomes of its ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path

import torch

from tests.faults.ranks import CULPRIT, WATCHDOG_SECONDS
from tests.hosts import VARIABLE as HOSTS

ROOT = Path(__file__).parents[2]
# Ranks start and import for some seconds; what matters is that they end well before this.
START_SECONDS = 120
POLL_SECONDS = 0.02


class FaultJob:
    """`num_ranks` ranks of which rank CULPRIT meets `fault`, in a folder that takes what each rank says."""

    def __init__(
        self,
        fault: str,
        num_ranks: int,
        folder: Path,
        transport: str = "auto",
        program: str = "ranks",
        **settings: str,
    ) -> None:
        """transport: of the host, as PIPEMOE_HOST_TRANSPORT names it, or the ranks' hosts. program: of this folder.
        settings: more variables of the job's environment.
        """
        self.folder, self._num_ranks = folder, num_ranks
        self._token = f"fault-{uuid.uuid4().hex}"
        environment = {**os.environ, "PIPEMOE_FAULT_TOKEN": self._token, "OMP_NUM_THREADS": "1"}
        # The launcher knows how many hardware queues a rank may have; tests' own are too many for four on one GPU.
        environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
        environment |= {"PYTHONFAULTHANDLER": "1", **settings}  # for `_stacks`
        environment |= {HOSTS: transport} if transport.isdecimal() else {"PIPEMOE_HOST_TRANSPORT": transport}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
        )
        launcher = ["launch/gpu_ranks.sh"] if torch.cuda.is_available() else ["launch/mpirun.sh", "-n"]
        command = [*launcher, str(num_ranks), "-m", f"tests.faults.{program}", fault, str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)

    def wait(self) -> tuple[str, str]:
        """The launcher's output, once it has ended. Raises AssertionError, with all that is known of the job, if it
        does not in time.
        """
        try:
            return self.process.communicate(timeout=START_SECONDS + 5 * WATCHDOG_SECONDS)
        except subprocess.TimeoutExpired:
            report = "\n".join(["the job does not end; its processes:", *self._states(), *self._stacks()])
            self.process.kill()
            raise AssertionError(report) from None

    def _states(self) -> list[str]:
        """Each process with its state, and where in the kernel it waits."""
        found = []
        for line in self.processes():
            with contextlib.suppress(OSError):
                folder = Path("/proc", line.split()[0])
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                found.append(f"{state} {(folder / 'wchan').read_text()} {line}")
        return found

    def _stacks(self) -> list[str]:
        """What the ranks have said, and where each thread of theirs is; it ends them."""
        for line in self.processes():
            if line.split()[2:4] == ["-m", "mpi4py"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line.split()[0]), signal.SIGABRT)
                    os.kill(int(line.split()[0]), signal.SIGCONT)
        said: dict[str, str] = {}
        with contextlib.suppress(subprocess.TimeoutExpired):
            said["the launcher"] = "".join(self.process.communicate(timeout=WATCHDOG_SECONDS))
        return [together(said | self.said())]

    def left_behind(self) -> list[str]:
        """Processes of the job that there still are after some grace: number and command."""
        deadline = time.monotonic() + 5 * WATCHDOG_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(5 * POLL_SECONDS)
        return left

    def processes(self) -> list[str]:
        """Those of the job that there are now."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._token.encode() in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(f"{entry.name} {command}")
            except OSError:
                continue
        return found

    def said(self) -> dict[str, str]:
        """Each rank's errors, by name ("rank0")."""
        return {path.name: path.read_text() for path in self.folder.glob("rank*")}

    def told(self) -> str:
        """All that the ranks have said, for a test that fails."""
        return together(self.said())

    def reasons(self) -> list[str]:
        """The lines in which ranks say why they end, survivors first: a stopped rank speaks too if its launcher wakes
        it.
        """
        said = sorted(self.said().items(), key=lambda item: item[0] == f"rank{CULPRIT}")
        return [line for _, text in said for line in text.splitlines() if line.startswith("pipemoe: ")]

    def seconds_to_end(self) -> list[float]:
        """For each survivor, from the fault to the end of its process. Raises TimeoutError if there was no fault, or
        one stays.
        """
        deadline = time.monotonic() + START_SECONDS + 5 * WATCHDOG_SECONDS
        fault, ended = self.folder / "fault", {}
        survivors = [rank for rank in range(self._num_ranks) if rank != CULPRIT]
        while len(ended) < len(survivors):
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks {sorted({*survivors} - {*ended})} have not ended")
            time.sleep(POLL_SECONDS)
            for rank in survivors if fault.exists() and fault.read_text() else ():
                if rank not in ended and not _is_alive(int((self.folder / f"pid{rank}").read_text())):
                    ended[rank] = time.time() - float(fault.read_text())
        return [ended[rank] for rank in survivors]


def together(said: dict[str, str]) -> str:
    """As one text: of a dict, pytest shows only the beginning and the end."""
    return "\n".join(f"{name}:\n{text}" for name, text in sorted(said.items()))


def _is_alive(pid: int) -> bool:
    """Is it there, and no mere entry that its parent has not looked at?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
