"""Faults while ranks roll: every future on every survivor fails with the named cause, and the survivors end in time. A
rank that is merely idle, or that leaves without a word, is none.
"""

from __future__ import annotations

import re

import pytest

from tests.faults.job import FaultJob

# What the futures of survivors say, and what their last words are.
FAULTS = {
    "kill": (r"PeerLost: rank \d: lost rank 1 \(", r"lost rank 1 \("),
    "stop": (
        r"(WatchdogTimeout: rank \d: no progress .* rank 1 says nothing|PeerLost: rank \d: lost rank 1)",
        r"no progress for \d+\.\d s in .*of slot \d.*rank 1 says nothing",
    ),
    "raise": (r"PeerLost: rank \d: rank 1 has closed its world \(ValueError: planted\)", "has closed its world"),
    "plan": (r"FatalError: rank \d: the ranks differ in", r"the ranks differ in .*: rank 0 has"),
    "kill idle": (None, r"lost rank 1 \("),
}
_MORE = [("raise", "auto"), ("kill idle", "auto"), ("kill", "mpi"), ("stop", "mpi")]
JOBS = [
    ("kill", "auto"),
    ("stop", "auto"),
    ("plan", "auto"),
    *(pytest.param(*job, marks=pytest.mark.slow) for job in _MORE),
]


@pytest.mark.parametrize(("fault", "transport"), JOBS, ids=str)
def test_every_future_names_the_cause(fault, transport, tmp_path):
    num_ranks = 3
    job = FaultJob(fault, num_ranks, tmp_path, transport, "engine_ranks")
    out, err = job.wait()
    assert job.process.returncode != 0, out + err
    assert not job.left_behind()
    said, (of_future, reason) = job.said(), FAULTS[fault]
    assert any(re.search(reason, line) for line in job.reasons()), job.told() or out + err
    if of_future is not None and (fault.startswith("kill") or fault in ("stop", "plan")):
        # a launcher may end a survivor before it has said so; not those of "kill", which are out of its reach
        told = [rank for rank in (0, 2) if re.search(f"^future: {of_future}", said[f"rank{rank}"], re.MULTILINE)]
        assert told == [0, 2] if fault == "kill" else told, job.told()


def test_what_is_no_fault(tmp_path):
    """All ranks are idle for longer than the watchdog waits; then one leaves without closing, and serves the others."""
    job = FaultJob("none", 2, tmp_path, program="engine_ranks")
    out, err = job.wait()
    assert job.process.returncode == 0, out + err + job.told()
    assert "rank 0 is done" in out
