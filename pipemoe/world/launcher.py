"""How many ranks this process was started with, as launchers say in the environment.

Ranks find one another by MPI only. A launcher that starts several processes without MPI (torchrun) is refused by name:
each process would take itself for the whole world.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from pipemoe.errors import ConfigError

# Launchers set these for each process that they start. The innermost launcher comes first. Slurm's variable is that of
# the job step (srun): SLURM_NTASKS is also set in an allocation's shell. It comes last, because MPI's own launcher may
# be started by a step with one process per node.
_SIZE_VARIABLES = (
    # Open MPI, MPICH and Intel, MVAPICH, jsrun
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE"),
    *("PALS_SIZE", "ALPS_APP_SIZE", "FLUX_JOB_SIZE", "SLURM_STEP_NUM_TASKS"),
)
# Process management interfaces that number the process, but do not always say how many there are.
_RANK_VARIABLES = ("PMIX_RANK", "PMI_RANK", "PMI_ID")
_TORCH_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # torchrun, accelerate, deepspeed
HOW_TO_START = "start the ranks with MPI: launch/mpirun.sh -n N script.py, or srun --mpi=pmix"


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher says."""

    num_ranks: int | None  # None: it does not say; MPI knows
    said_by: str  # the variable


def launched(environment: Mapping[str, str]) -> Launch:
    """The launch that the environment describes.

    Raises ConfigError for a variable that makes no sense, and for a launcher without MPI.
    """
    sizes = {name: _number(environment, name, least=1) for name in _SIZE_VARIABLES if name in environment}
    ranks = {name: _number(environment, name, least=0) for name in _RANK_VARIABLES if name in environment}
    inner = [name for name in _SIZE_VARIABLES[:-1] if name in sizes]
    for name in inner or sizes:
        if sizes[name] == max(sizes[n] for n in inner or sizes) and sizes[name] > 1:
            return Launch(sizes[name], name)
    if running_size() > 1:
        return Launch(None, "mpi4py")
    if ranks and (not sizes or max(ranks.values()) > 0):
        return Launch(None, max(ranks, key=ranks.__getitem__))
    said_by = next(iter(inner or sizes), "no launcher")
    _check_torch(environment)
    return Launch(1, said_by)


def _check_torch(environment: Mapping[str, str]) -> None:
    """Refuse torchrun where MPI sees one rank."""
    if "WORLD_SIZE" in environment and _number(environment, "WORLD_SIZE", least=1) > 1:
        found = ", ".join(f"{name}={environment[name]}" for name in _TORCH_VARIABLES if name in environment)
        launcher = (
            "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "a launcher of torch.distributed (such as torchrun)"
        )
        raise ConfigError(
            f"{found} says that {launcher} started {environment['WORLD_SIZE']} processes, but pipemoe's ranks meet "
            "over MPI, and each"
            f" of these would be alone; {HOW_TO_START}. For one process on its own, unset WORLD_SIZE"
        )


def check_size(launch: Launch, size: int, environment: Mapping[str, str]) -> None:
    """Raises ConfigError unless the MPI that runs, with `size` ranks, is that of the launcher."""
    rank = max((_number(environment, name, least=0) for name in _RANK_VARIABLES if name in environment), default=0)
    if launch.num_ranks not in (None, size):
        said = f"the launcher started {launch.num_ranks} ranks ({launch.said_by})"
    elif launch.num_ranks is None and rank >= size:
        said = f"{launch.said_by} says that this is rank {rank}"
    else:
        if size == 1:
            _check_torch(environment)
        return
    raise ConfigError(
        f"{said}, but the MPI that mpi4py loads sees {size} rank{'s' * (size > 1)}: it is not the launcher's; "
        "`pipemoe doctor` shows"
        f" both; {HOW_TO_START}"
    )


def ranks_on_this_host(environment: Mapping[str, str], num_ranks: int) -> int:
    """The number that the launcher gives, or else all ranks."""
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return num_ranks


def rank_text(environment: Mapping[str, str]) -> str:
    """This rank in words, before MPI runs."""
    for name in ("OMPI_COMM_WORLD_RANK", *_RANK_VARIABLES, "SLURM_PROCID"):
        if environment.get(name, "").isdecimal():
            return f"rank {environment[name]}"
    return "this rank"


def running_size() -> int:
    """The number of ranks of an MPI that this process has already started; 0 if it has not."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi.COMM_WORLD.Get_size() if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() else 0


def _number(environment: Mapping[str, str], name: str, *, least: int) -> int:
    text = environment[name].strip()
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        wanted = f"a launcher sets it to a whole number of at least {least}; unset it, or {HOW_TO_START}"
        raise ConfigError(f"{name} is {environment[name][:40]!r}, but {wanted}")
    return int(text)
