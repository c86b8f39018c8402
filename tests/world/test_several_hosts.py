"""Ranks of several hosts: memory is shared inside each, MPI moves rows and sums between them, with the same results."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "hosts",
    [("010",), ("0011", "0121", "0123")],
    ids=lambda hosts: f"{len(hosts[0])} ranks",
)
def test_sums_are_those_of_one_host(hosts):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PIPEMOE_HOST_TRANSPORT": "auto"}
    command = ["launch/mpirun.sh", "-n", str(len(hosts[0])), "-m", "tests.world.several_hosts", *hosts]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    for names in hosts:
        assert done.stderr.count(f"sums are the same on {names}") == len(names)
    # Only where no ranks are neighbours does MPI move all rows, and says so.
    apart = [names for names in hosts if len(set(names)) == len(names)]
    said = [line for line in done.stderr.splitlines() if "no shared memory" in line]
    assert said == [
        "pipemoe: no shared memory between the ranks, so MPI moves their rows: no host has two ranks"
    ] * len(apart)
