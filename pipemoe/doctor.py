"""`pipemoe doctor`: what this machine has, what is wrong with it, and what to do about it.

Every check looks at the machine as a rank would find it and returns findings; none raises, and none needs a GPU, an MPI
or anything beyond pipemoe's own requirements to be there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipemoe.comm.nccl import default_max_ctas
from pipemoe.errors import ConfigError
from pipemoe.plan.room import Room
from pipemoe.world.shared_memory import BYTES_OF_RANK, old_segments

# Several ranks on one GPU without a host id each: since this version (nccl.get_version() encoding).
MULTI_RANK_GPU_NCCL = 23003
# MPICH and NCCL move data between processes of a host through /dev/shm; containers often get 64 MiB.
SHARED_MEMORY_BYTES = 1 << 30
_SHOWN_SEGMENTS = 20
_NCCL_WHEELS = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `status` is OK, WARN (works, but not as it should) or FAIL (will not work)."""

    subject: str
    status: str
    seen: str
    action: str = ""  # what to do; empty when OK


def examine(*, num_slots: int = 4, ranks_per_gpu: int = 1) -> list[Finding]:
    """Look at everything; `num_slots` cohort slots and `ranks_per_gpu` ranks are what thread blocks are counted for."""
    gpus = installed_gpus()
    checks: Sequence[Callable[[], list[Finding]]] = (
        check_packages,
        check_compiled_code,
        lambda: check_gpus(gpus),
        lambda: check_nccl(gpus, ranks_per_gpu),
        lambda: check_nccl_wheels(gpus),
        lambda: check_room(gpus, num_slots, ranks_per_gpu),
        lambda: check_mps(gpus, ranks_per_gpu),
        lambda: check_connections(gpus),
        check_mpi,
        check_host_transport,
        check_shared_memory,
        check_old_segments,
    )
    return [finding for check in checks for finding in check()]


def report(findings: Sequence[Finding], *, as_json: bool = False) -> str:
    """The findings as aligned lines, or as one JSON document `{"healthy": bool, "findings": [...]}`."""
    if as_json:
        healthy = all(finding.status != "FAIL" for finding in findings)
        return json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in findings]})
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:4}  {finding.subject:{width}}  {finding.seen}")
        if finding.action:
            lines.append(f"{'':4}  {'':{width}}  -> {finding.action}")
    return "\n".join(lines)


def check_packages() -> list[Finding]:
    """Python and the required packages must be there; the others are told of when they are not."""
    too_old = sys.version_info < (3, 11)
    action = "use Python 3.11 or newer" if too_old else ""
    findings = [Finding("Python", "FAIL" if too_old else "OK", platform.python_version(), action)]
    for name in ("torch", "numpy", "numba", "safetensors"):
        version = installed_version(name)
        if version is None:
            findings.append(Finding(name, "FAIL", "not installed", "launch/install.sh, or pip install pipemoe"))
        elif name == "numpy" and _numbers(version) >= (2, 5):
            findings.append(Finding(name, "FAIL", version, "numba-cuda needs an older one: pip install 'numpy<2.5'"))
        else:
            findings.append(Finding(name, "OK", version))
    for name, purpose, extra in (
        ("transformers", "load_model needs", "models"),
        ("mpi4py", "several ranks need", "mpi"),
    ):
        if version := installed_version(name):
            findings.append(Finding(name, "OK", version))
        else:
            findings.append(Finding(name, "WARN", "not installed", f"{purpose} it: pip install 'pipemoe[{extra}]'"))
    return findings


def check_compiled_code() -> list[Finding]:
    """Whether what numba compiles at the first start, for seconds, is there at the next one."""
    if installed_version("numba") is None:
        return []
    try:
        from pipemoe.kept_code import folder_for
        from pipemoe.plan.planner import plan

        folder = folder_for(plan)
    except Exception as error:  # a broken install says why in many ways
        return [Finding("compiled code", "FAIL", _first_line(error), "reinstall numba")]
    if folder is None:
        return [
            Finding(
                "compiled code",
                "WARN",
                "cannot be kept: every start compiles again",
                "set NUMBA_CACHE_DIR to a folder that can be written",
            )
        ]
    return [Finding("compiled code", "OK", f"kept in {folder}")]


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    driver: str
    memory_mib: int
    num_sms: int | None  # of the first GPU that torch may use; None when it can use none


def check_gpus(gpus: Sequence[Gpu]) -> list[Finding]:
    """Driver, GPUs, and whether torch and Numba can use them."""
    if not gpus:
        return [Finding("GPU", "OK", "none that nvidia-smi lists: ranks run on the host")]
    too_old = _numbers(gpus[0].driver) < (525,)
    action = "CUDA 12 needs driver 525 or newer, CUDA 13 needs 580" if too_old else ""
    findings = [Finding("driver", "FAIL" if too_old else "OK", gpus[0].driver, action)]
    for index, gpu in enumerate(gpus):
        sms = "" if gpu.num_sms is None else f", {gpu.num_sms} SMs"
        findings.append(Finding(f"GPU {index}", "OK", f"{gpu.name}, {gpu.memory_mib} MiB{sms}"))
    try:
        import torch

        cuda, usable = torch.version.cuda, torch.cuda.is_available()
    except Exception as error:  # a broken install says why in many ways
        return [*findings, Finding("torch and CUDA", "FAIL", _first_line(error), "reinstall torch")]
    if cuda is None:
        findings.append(Finding("torch and CUDA", "FAIL", "a CPU build of torch", "install a CUDA build of torch"))
    elif not usable:
        action = f"a driver that runs CUDA {cuda} (13 needs 580), or a torch built for an older CUDA"
        findings.append(Finding("torch and CUDA", "FAIL", f"torch for CUDA {cuda} cannot use the GPU", action))
    else:
        findings.append(Finding("torch and CUDA", "OK", f"CUDA {cuda}"))
    version = installed_version("numba-cuda")
    action = "" if version else f"pip install 'pipemoe[{_cuda_extra(gpus)}]'"
    findings.append(Finding("numba-cuda", "OK" if version else "FAIL", version or "not installed", action))
    return findings


def check_nccl(gpus: Sequence[Gpu], ranks_per_gpu: int) -> list[Finding]:
    """NCCL as cupy finds it after torch, and how many libnccl this process has loaded by then."""
    if not gpus:
        return []
    install = f"pip install 'pipemoe[{_cuda_extra(gpus)}]'"
    try:
        import torch  # noqa: F401  first, as in a rank: it may bring a libnccl of its own
        from cupy.cuda import nccl
    except Exception as error:
        return [Finding("NCCL", "FAIL", f"cupy: {_first_line(error)}", install)]
    if not nccl.available:
        return [Finding("NCCL", "FAIL", "cupy found none", f"{install} (nvidia-nccl must be beside the cupy wheel)")]
    version = nccl.get_version()
    findings = [Finding("NCCL", "OK", f"{version // 10000}.{version // 100 % 100}.{version % 100}")]
    if ranks_per_gpu > 1 and version < MULTI_RANK_GPU_NCCL:
        action = "LD_PRELOAD a libnccl.so.2 of 2.30.3 or newer; launch/one_gpu.sh goes over loopback sockets otherwise"
        findings = [Finding("NCCL", "WARN", f"{findings[0].seen} cannot run several ranks on a GPU directly", action)]
    libraries = loaded_libraries("libnccl.so")
    if len(libraries) > 1:
        action = "a process must load one only: remove one of the packages, or LD_PRELOAD the one to use"
        findings.append(Finding("libnccl", "FAIL", f"{len(libraries)} loaded: {', '.join(libraries)}", action))
    else:
        findings.append(Finding("libnccl", "OK", ", ".join(libraries) or "linked statically"))
    return findings


def check_nccl_wheels(gpus: Sequence[Gpu]) -> list[Finding]:
    """Whether the wheels of NCCL for two CUDAs are there, which write one and the same file; nothing if not."""
    wheels = {name: installed_version(name) for name in _NCCL_WHEELS}
    if not gpus or not all(wheels.values()):
        return []
    seen = " and ".join(f"{name} {version}" for name, version in wheels.items())
    action = (
        f"keep the one of your CUDA: pip uninstall -y {' '.join(_NCCL_WHEELS)}, then install one extra again, "
        "pipemoe[cuda12] or pipemoe[cuda13] (removing only one takes the other's file away)"
    )
    return [Finding("NCCL wheels", "FAIL", f"{seen} share one file, libnccl.so.2: the later one wrote it", action)]


def check_room(gpus: Sequence[Gpu], num_slots: int, ranks_per_gpu: int) -> list[Finding]:
    """Dispatch and combine of every slot of every rank on a GPU may wait at once; the same check as at start-up."""
    num_sms = min((gpu.num_sms for gpu in gpus if gpu.num_sms), default=None)
    if num_sms is None:
        return []
    setting = os.environ.get("NCCL_MAX_CTAS", "")
    ctas = int(setting) if setting.isdecimal() else default_max_ctas(num_sms, num_slots, ranks_per_gpu)
    seen = (
        f"{ranks_per_gpu} ranks on a GPU x 2 x {num_slots} slots x "
        f"{ctas} CTAs, {num_sms} SMs (NCCL_MAX_CTAS {setting or 'not set'})"
    )
    try:
        Room(num_sms, ctas, ranks_on_device=ranks_per_gpu).check(num_slots)
    except ConfigError as error:
        return [Finding("thread blocks", "FAIL", seen, str(error))]
    return [Finding("thread blocks", "OK", seen)]


def check_mps(gpus: Sequence[Gpu], ranks_per_gpu: int) -> list[Finding]:
    if not gpus:
        return []
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control"
    running = control.exists() and any(
        _read(Path(entry, "comm")).startswith("nvidia-cuda-mps") for entry in Path("/proc").glob("[0-9]*")
    )
    if running:
        share = os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")
        return [Finding("MPS", "OK", f"running, {share} % of the SMs for this process")]
    if ranks_per_gpu > 1:
        return [Finding("MPS", "WARN", "not running", "ranks on a GPU take turns without: use launch/one_gpu.sh")]
    return [Finding("MPS", "OK", "not running")]


def check_connections(gpus: Sequence[Gpu]) -> list[Finding]:
    """Streams beyond CUDA_DEVICE_MAX_CONNECTIONS share a queue, and a waiting one then blocks its neighbour."""
    if not gpus:
        return []
    subject, setting = "CUDA_DEVICE_MAX_CONNECTIONS", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "")
    if not setting:
        return [Finding(subject, "OK", "not set (pipemoe.init sets what its slots need)")]
    if not setting.isdecimal() or int(setting) < 8:
        return [
            Finding(
                subject, "FAIL", setting, "unset it, or set it to 32 (16 under MPS): cohorts would wait for one another"
            )
        ]
    if int(setting) > 16 and "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        return [Finding(subject, "WARN", setting, "under MPS more than 16 ran out of memory: set it to 16")]
    return [Finding(subject, "OK", setting)]


def check_mpi() -> list[Finding]:
    """The MPI that mpi4py loads, and whether the mpirun that launch/mpirun.sh would take belongs to it."""
    if installed_version("mpi4py") is None:
        return []
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # MPI_Get_library_version may be called before MPI_Init
        from mpi4py import MPI

        library = MPI.Get_library_version().split("\n")[0].strip("\0 ")
    except Exception as error:
        return [Finding("MPI", "FAIL", _first_line(error), "install an MPI, or the wheel: pip install mpich")]
    findings = [Finding("MPI", "OK", re.sub(r"\s+", " ", library.split(", package")[0]))]
    beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    mpirun = os.environ.get("PIPEMOE_MPIRUN") or beside or shutil.which("mpirun") or shutil.which("mpiexec")
    if mpirun is None:
        return [*findings, Finding("mpirun", "FAIL", "none on PATH", "put the bin folder of that MPI on PATH")]
    version = _output(mpirun, "--version")
    ours, theirs = _mpi_vendor(library), _mpi_vendor(version)
    if ours != theirs:
        seen = f"{mpirun} is {theirs or 'of no known MPI'}, mpi4py loads {ours or library}"
        action = "every rank would be alone: set PIPEMOE_MPIRUN to that MPI's mpirun, or rebuild mpi4py for this one"
        return [*findings, Finding("mpirun", "FAIL", seen, action)]
    return [*findings, Finding("mpirun", "OK", f"{mpirun} ({theirs})")]


def check_host_transport() -> list[Finding]:
    """How ranks of this host would exchange rows without a GPU, and whether they share the cores fairly."""
    from pipemoe.comm.shared.memory import refusal
    from pipemoe.world.shared_host import VARIABLE, wanted_transport

    subject = "host transport"
    try:
        wanted = wanted_transport()
    except ConfigError as error:
        return [Finding(subject, "FAIL", os.environ.get(VARIABLE, ""), str(error))]
    if wanted == "mpi":
        return [Finding(subject, "OK", f"MPI ({VARIABLE})")]
    refused = refusal()
    if refused:
        verdict = "WARN" if wanted == "auto" else "FAIL"
        return [Finding(subject, verdict, f"MPI: {refused}", "ranks on the CPU are slower over MPI")]
    seen = "shared memory (ranks of one host)"
    if _read(Path("/proc/sys/kernel/sched_autogroup_enabled")).strip() == "1":
        seen += "; sessions share the cores (autogroup), so niceness counts within a rank only"
    return [Finding(subject, "OK", seen)]


def check_shared_memory() -> list[Finding]:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError as error:
        return [Finding("/dev/shm", "WARN", _first_line(error), "ranks of one host exchange data through it: mount it")]
    if size < 2 * BYTES_OF_RANK:
        action = (
            f"MPI needs {BYTES_OF_RANK >> 20} MiB for each rank: make it 1 GiB or more (in a container: --shm-size)"
        )
        return [Finding("/dev/shm", "FAIL", f"{size >> 20} MiB", action)]
    if size < SHARED_MEMORY_BYTES:
        return [Finding("/dev/shm", "WARN", f"{size >> 20} MiB", "make it 1 GiB or more (in a container: --shm-size)")]
    return [Finding("/dev/shm", "OK", f"{size >> 20} MiB")]


def check_old_segments() -> list[Finding]:
    """What MPI's jobs that ended badly have left in /dev/shm; nothing where there is none."""
    left = old_segments()
    if not left:
        return []
    size = 0
    for path in left:
        with contextlib.suppress(OSError):
            size += path.stat().st_size
    names = " ".join(map(str, left[:_SHOWN_SEGMENTS])) + (
        f" and {len(left) - _SHOWN_SEGMENTS} more" if len(left) > _SHOWN_SEGMENTS else ""
    )
    seen = f"{len(left)} files of MPI that no process has mapped, {size / 2**20:.0f} MiB"
    return [
        Finding("old segments", "WARN", seen, f"where no job in another container uses them, remove them: rm {names}")
    ]


def loaded_libraries(name: str) -> list[str]:
    """Paths of the shared libraries in this process whose file name starts with `name`."""
    paths = {line.split(maxsplit=5)[-1].strip() for line in _read(Path("/proc/self/maps")).splitlines()}
    return sorted(path for path in paths if Path(path).name.startswith(name))


def installed_gpus() -> list[Gpu]:
    """The GPUs that nvidia-smi lists; none without a working driver."""
    output = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits")
    rows = [[field.strip() for field in line.split(",")] for line in output.splitlines()]
    rows = [row for row in rows if len(row) == 3 and row[2].isdecimal()]
    if not rows:
        return []
    try:
        import torch

        num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    except Exception:  # check_gpus says what is wrong with torch
        num_sms = None
    return [Gpu(name, driver, int(memory), num_sms) for name, driver, memory in rows]


def _cuda_extra(gpus: Sequence[Gpu]) -> str:
    return "cuda13" if _numbers(gpus[0].driver) >= (580,) else "cuda12"


def _mpi_vendor(text: str) -> str | None:
    vendors = {"Open MPI": r"Open MPI|OpenRTE|PRRTE", "Intel MPI": r"Intel\(R\) MPI", "MPICH": r"MPICH|HYDRA"}
    return next((vendor for vendor, words in vendors.items() if re.search(words, text)), None)


def installed_version(package: str) -> str | None:
    """The version of a distribution; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
