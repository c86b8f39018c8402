"""How a world starts and how it ends, in real jobs: whoever does not come, stops or raises, the others end in time and
say why, and what is no fault ends no job."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from pipemoe.runtime.last_words import EXIT_CODE

pytest.importorskip("mpi4py")

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 150  # ranks start and import for some seconds; a hang is what takes this long


def run_job(
    case: str, num_ranks: int, folder: Path, **settings: str
) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """The job once it has ended, and what each rank wrote on standard error, by name ("rank0")."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = ["launch/mpirun.sh", "-n", str(num_ranks), "-m", "tests.faults.lives", case, str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    return result, {path.name: path.read_text() for path in folder.glob("rank*")}


# What the ranks that wait say, who is missing, stopped or gone named.
LOST = {
    "absent_with_mpi": r"has waited \d+ of at most 6 s for rank 1 to call pipemoe.init\(\)\n(.*\n)*"
    r".*WatchdogTimeout: rank 0: waited \d+\.\d s for rank 1 to call",
    "absent_without_mpi": r"WatchdogTimeout: rank 0: waited \d+\.\d s for all 2 ranks to start MPI; "
    r"is there a rank that does not call pipemoe.init",
    "stopped_in_good_bye": r"rank 0: at the end of the process: rank 1, which MPI's finalisation needs, "
    r"was not heard for \d+\.\d s",
    "stopped_after_close": r"rank 0: at the end of the process: rank 1, which MPI's finalisation needs, "
    r"was not heard for \d+\.\d s",
    "stopped_in_finalisation": r"rank 0: at the end of the process: MPI's finalisation, "
    r"which waits for rank 1, takes more than 2.0 s",
    "killed_after_close": r"rank 0: at the end of the process: rank 1 has ended without MPI's finalisation",
}


@pytest.mark.parametrize("case", LOST)
def test_a_rank_that_is_missing_is_named_and_ends_the_wait(case, tmp_path):
    result, said = run_job(case, 2, tmp_path)
    assert re.search(LOST[case], said["rank0"]), said
    assert result.returncode == EXIT_CODE, result.stdout + result.stderr


def test_what_is_no_fault_of_the_job_ends_none(tmp_path):
    """Three cases in one job, one world after another."""
    cases = ["bad_arguments", "forks", "busy_after_close"]
    result, said = run_job(",".join(cases), 2, tmp_path)
    assert result.returncode == 0, said
    assert [result.stdout.count(f"survived {case}") for case in cases] == [2, 2, 2], result.stdout
    assert not any(said.values()), said


@pytest.mark.parametrize("case", ["own_error_inside", "own_error_at_the_top", "own_error_in_finally"])
def test_the_cause_is_written_before_the_good_bye_and_travels_with_it(case, tmp_path):
    result, said = run_job(case, 2, tmp_path)
    assert result.returncode != 0
    planted = r"ValueError: planted \w+"
    assert re.search(
        rf"lost|rank 1 has closed its world \({planted}.*\), but something needs every rank", said["rank0"]
    ), said
    assert re.search(planted, said["rank1"]), said
    if case != "own_error_in_finally":  # there the rank goes on for too long, before Python may print it
        assert "Traceback" in said["rank1"] and "/tests/faults/lives.py" in said["rank1"], said


@pytest.mark.parametrize("case", ["shared_error", "shared_error_of_init"])
def test_an_error_of_all_ranks_is_printed_once_and_without_internal_frames(case, tmp_path):
    result, said = run_job(case, 3 if case == "shared_error" else 2, tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    text = said.pop("rank0")
    assert not any(said.values()), said
    assert re.search(r"(InputError: rank 1: planted for all|ConfigError: rank 1: num_slots is 'many'; .*)\n$", text), (
        text
    )
    files = set(re.findall(r'File "(.*?)"', text))
    assert {Path(file).name for file in files} == {"lives.py"}, text
    assert "MPI_Abort" not in result.stdout + result.stderr + text  # all ended in order


def test_the_first_rank_that_does_not_catch_it_prints_it_and_debug_shows_all(tmp_path):
    _, said = run_job("shared_error_caught_by_the_first", 3, tmp_path)
    assert not said["rank0"] and not said["rank2"] and "planted for all" in said["rank1"], said
    for path in tmp_path.glob("rank*"):
        path.unlink()
    _, said = run_job("shared_error", 2, tmp_path, PIPEMOE_DEBUG="1")
    assert all("/pipemoe/world/world.py" in text and "planted for all" in text for text in said.values()), said
