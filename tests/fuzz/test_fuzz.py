"""Arguments mutated at random over the public API, on 1 and 2 ranks: each call ends in success or in the same
PipemoeError on every rank, never in another exception, a hang, or a wrong result, and the next call works.

PIPEMOE_FUZZ_CASES  how many cases the slow test takes on each number of ranks (default 5000); a tenth as many of init
PIPEMOE_FUZZ_SEED   of the slow test (default 1)
"""

from __future__ import annotations

import os

import pytest

from tests.fuzz.campaign import run

_SEED = 0
# On one rank, in one process, init may be called many times; on several each of its cases takes a second.
_JOBS = {
    "1 rank": (1, 60, "api"),
    "1 rank, init": (1, 25, "init"),
    "2 ranks": (2, 80, "api"),
    "2 ranks, init": (2, 6, "init"),
}


@pytest.mark.parametrize("job", _JOBS)
def test_mutated_arguments(job):
    num_ranks, num_cases, section = _JOBS[job]
    tally = run(num_ranks, num_cases, seed=_SEED, section=section, most_failures=3)
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.num_cases == num_cases, tally.table()


@pytest.mark.slow
@pytest.mark.parametrize("section", ["api", "init"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_many_mutated_arguments(num_ranks, section):
    num_cases = int(os.environ.get("PIPEMOE_FUZZ_CASES", "5000")) // (10 if section == "init" else 1)
    tally = run(
        num_ranks, num_cases, seed=int(os.environ.get("PIPEMOE_FUZZ_SEED", "1")), section=section, most_failures=50
    )
    print(tally.table())
    assert not tally.failures, "\n".join(tally.failures)
    assert tally.num_cases == num_cases, tally.table()
