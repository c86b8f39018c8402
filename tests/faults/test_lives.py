"""How a world starts and how it ends, in real jobs: whoever does not come, stops or raises, the others end in time and
say why, and what is no fault ends no job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipemoe.runtime.last_words import EXIT_CODE
from tests.faults.job import FaultJob, together
from tests.faults.lives import WATCHDOG_SECONDS

pytest.importorskip("mpi4py")


def run_job(case: str, num_ranks: int, folder: Path, **settings: str) -> tuple[int, str, dict[str, str]]:
    """The job's status and output once it has ended, and what each rank wrote on standard error, by name ("rank0")."""
    job = FaultJob(case, num_ranks, folder, program="lives", **settings)
    out, err = job.wait()
    return job.process.returncode, out + err, job.said()


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
    rf"which waits for rank 1, takes more than {WATCHDOG_SECONDS} s",
    "killed_after_close": r"rank 0: at the end of the process: rank 1 has ended without MPI's finalisation",
}


@pytest.mark.parametrize("case", LOST)
def test_a_rank_that_is_missing_is_named_and_ends_the_wait(case, tmp_path):
    status, output, said = run_job(case, 2, tmp_path)
    assert re.search(LOST[case], said["rank0"]), together(said)
    assert status == EXIT_CODE, output


def test_what_is_no_fault_of_the_job_ends_none(tmp_path):
    """Three cases in one job, one world after another."""
    cases = ["bad_arguments", "forks", "busy_after_close"]
    status, output, said = run_job(",".join(cases), 2, tmp_path)
    assert status == 0, together(said)
    assert [output.count(f"survived {case}") for case in cases] == [2, 2, 2], output
    assert not any(said.values()), together(said)


@pytest.mark.parametrize("case", ["own_error_inside", "own_error_at_the_top", "own_error_in_finally"])
def test_the_cause_is_written_before_the_good_bye_and_travels_with_it(case, tmp_path):
    status, output, said = run_job(case, 2, tmp_path)
    assert status != 0
    planted = r"ValueError: planted \w+"
    assert re.search(
        rf"lost|rank 1 has closed its world \({planted}.*\), but something needs every rank", said["rank0"]
    ), together(said)
    assert re.search(planted, said["rank1"]), together(said)
    if case != "own_error_in_finally":  # there the rank goes on for too long, before Python may print it
        assert "Traceback" in said["rank1"] and "/tests/faults/lives.py" in said["rank1"], together(said)


@pytest.mark.parametrize("case", ["shared_error", "shared_error_of_init"])
def test_an_error_of_all_ranks_is_printed_once_and_without_internal_frames(case, tmp_path):
    status, output, said = run_job(case, 3 if case == "shared_error" else 2, tmp_path)
    assert status == 1, output
    text = said.pop("rank0")
    assert not any(said.values()), together(said)
    assert re.search(r"(InputError: rank 1: planted for all|ConfigError: rank 1: num_slots is 'many'; .*)\n$", text), (
        text
    )
    files = set(re.findall(r'File "(.*?)"', text))
    assert {Path(file).name for file in files} == {"lives.py"}, text
    assert "MPI_Abort" not in output + text  # all ended in order


def test_the_first_rank_that_does_not_catch_it_prints_it_and_debug_shows_all(tmp_path):
    _, _, said = run_job("shared_error_caught_by_the_first", 3, tmp_path)
    assert not said["rank0"] and not said["rank2"] and "planted for all" in said["rank1"], together(said)
    for path in tmp_path.glob("rank*"):
        path.unlink()
    _, _, said = run_job("shared_error", 2, tmp_path, PIPEMOE_DEBUG="1")
    assert all("/pipemoe/world/world.py" in text and "planted for all" in text for text in said.values()), together(
        said
    )
