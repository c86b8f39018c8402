"""What the environment says of the number of ranks, for every launcher that is known."""

from __future__ import annotations

import os

import pytest

import pipemoe
from pipemoe.errors import ConfigError
from pipemoe.world import world as world_module
from pipemoe.world.launcher import Launch, check_size, launched, rank_text

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("environment", "num_ranks"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1),
        # plain python in the shell of an allocation
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "PMIX_RANK": "0"}, 1),  # ... that is a step of its own
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "PMIX_RANK": "3"}, 8),  # srun --mpi=pmix
        ({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "4", "PMI_RANK": "1"}, 4),  # srun --mpi=pmi2
        ({"SLURM_STEP_NUM_TASKS": "4", "PMI_SIZE": "2"}, 2),  # mpiexec, whose helpers a step started, one a node
        ({"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "16"}, 16),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}, 2),
        ({"PMI_SIZE": "3", **TORCHRUN}, 3),  # left over from something else
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 1),  # mpirun -n 1
        ({"JSM_NAMESPACE_SIZE": "6"}, 6),
        ({"MV2_COMM_WORLD_SIZE": "2"}, 2),
        ({"FLUX_JOB_SIZE": "2"}, 2),
        ({"PMIX_RANK": "0"}, None),  # only MPI knows
        ({"PMI_RANK": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "1"}, None),  # prterun in a step of one process
    ],
)
def test_number_of_ranks(environment, num_ranks):
    assert launched(environment).num_ranks == num_ranks


@pytest.mark.parametrize(
    "environment",
    [TORCHRUN, {"WORLD_SIZE": "2"}, {**TORCHRUN, "PMI_SIZE": "1"}, {"WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "1"}],
)
def test_launchers_without_mpi_are_refused_by_name(environment):
    with pytest.raises(ConfigError, match=rf"WORLD_SIZE={environment['WORLD_SIZE']}.* torchrun.*launch/mpirun.sh -n N"):
        launched(environment)


@pytest.mark.parametrize("text", ["", " ", "abc", "0", "-2", "2.0", "²", "1e3"])
@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "WORLD_SIZE"])
def test_odd_values_are_named(name, text):
    with pytest.raises(
        ConfigError, match=f"^{name} is {text!r}, but a launcher sets it to a whole number of at least 1"
    ):
        launched({name: text})


@pytest.mark.parametrize(
    ("launch", "size", "environment", "said"),
    [
        (
            Launch(4, "SLURM_STEP_NUM_TASKS"),
            1,
            {},
            r"started 4 ranks \(SLURM_STEP_NUM_TASKS\), but the MPI that mpi4py loads sees 1 rank:",
        ),
        (Launch(2, "PMI_SIZE"), 4, {}, r"started 2 ranks \(PMI_SIZE\), but the MPI that mpi4py loads sees 4 ranks:"),
        (
            Launch(None, "PMIX_RANK"),
            1,
            {"PMIX_RANK": "1"},
            r"PMIX_RANK says that this is rank 1, but the MPI that mpi4py loads sees 1 rank:",
        ),
        (Launch(None, "PMIX_RANK"), 1, {"PMIX_RANK": "0", **TORCHRUN}, "torchrun"),
    ],
)
def test_another_mpi_than_the_launchers_is_refused(launch, size, environment, said):
    with pytest.raises(ConfigError, match=said):
        check_size(launch, size, environment)


def test_the_launchers_own_mpi_is_accepted():
    check_size(Launch(4, "PMI_SIZE"), 4, {"WORLD_SIZE": "2"})
    check_size(Launch(None, "PMIX_RANK"), 2, {"PMIX_RANK": "1"})
    check_size(Launch(None, "PMIX_RANK"), 1, {"PMIX_RANK": "0"})


def test_init_asks(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("PMI", "OMPI_", "SLURM_", "MPI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(world_module, "_open_world", None)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="says that torchrun started 2 processes"):
        pipemoe.init("cpu")
    assert world_module._open_world is None


def test_a_rank_has_a_name_before_mpi_knows_it():
    assert rank_text({"PMI_RANK": "2"}) == "rank 2" and rank_text({"SLURM_PROCID": "1"}) == "rank 1"
    assert rank_text({}) == rank_text({"PMI_RANK": ""}) == "this rank"
