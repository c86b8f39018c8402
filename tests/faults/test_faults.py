"""Faults that end a step for good: every survivor says what happened on which rank and ends in time; nothing is left
behind.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.faults.job import FaultJob
from tests.faults.ranks import KILLED_IN, OF_ROWS

# fault: what survivors say (a launcher may end one before it has; not those of "kill", which are out of its reach)
FAULTS = {
    "kill": r"lost rank 1 \(",
    **{f"kill {place}": r"lost rank 1 \(" for place in KILLED_IN},
    "stop": r"no progress for \d+\.\d s in .*rank 1: step \d+, .* heard [1-9]",
    "barrier": r"no progress for \d+\.\d s in .*",
    "transport": r"rank 1: OSError in .*planted in the transport",
    "conductor": r"rank 1: ValueError in .*planted in the conductor",
    "planning": r"rank 0: .*rank 1.* no plan for this step: PlanError: .*OSError: planted in the planning",
    "plan": r"rank 1 follows another plan than rank 0",
    "absent": r"no progress for \d+\.\d s in exchange of step 2; peers: .*rank 1: step 1, .*idle",
    "missing rows": r"rank 0: no progress for \d+\.\d s in dispatch\(cohort 0, layer 2, wave 0\)",
    "other count": r"rank 1 follows another plan than rank 0|rank \d: \w+ in dispatch\(cohort 0, layer 0, wave 0\)",
    "abort": r"rank 1: \w+ in .*layer [23]|rank 1: \w+: .*layer [23]",
    "exit": r"rank 1 has closed its world, but exchange of step 2 needs every rank",
}


# Ranks take seconds to start, and one survivor is enough, but where the launcher does not end the others for it.
NUM_RANKS = dict.fromkeys(FAULTS, 2) | {"kill": 3, "kill experts": 4, "kill exchange": 3, "stop": 3}


# Of ranks that share memory, a few of those that MPI connects, and of those on two hosts (see tests.hosts).
JOBS = [(fault, "auto") for fault in FAULTS if fault not in OF_ROWS]
JOBS += [(fault, "mpi") for fault in ("stop", "transport", "kill combine", *OF_ROWS)]
JOBS += [("kill experts", "0011"), ("kill", "010"), ("stop", "001")]


@pytest.mark.parametrize(("fault", "transport"), JOBS, ids=str)
def test_survivors_end_with_the_reason(fault, transport, tmp_path):
    if fault == "abort" and not torch.cuda.is_available():
        pytest.skip("MPI's communicators are not aborted alone")
    job = FaultJob(fault, NUM_RANKS[fault], tmp_path, transport)
    out, err = job.wait()
    assert job.process.returncode != 0, out + err
    assert "survived" not in out
    left = job.left_behind()
    assert not left, f"processes left behind: {left}"
    said = job.said()
    assert any(re.search(FAULTS[fault], line) for line in job.reasons()), job.told() or out + err
    # out of the launcher's reach: the survivors ended by themselves, and each named the one that was killed
    if fault.startswith("kill"):
        for rank in range(NUM_RANKS[fault]):
            named = re.findall(
                rf"^pipemoe: PeerLost: rank {rank}: lost rank (\d+) .* during (.*), (?:after|where|in one call)",
                said[f"rank{rank}"],
                re.M,
            )
            assert [name for name, _ in named] == ([] if rank == 1 else ["1"]), job.told()
            assert not named or "idle" not in named[0][1]
