"""Ranks of several hosts: MPI moves their rows, and they say so."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_ranks_of_two_hosts_use_mpi_and_say_so_in_one_line():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PIPEMOE_HOST_TRANSPORT": "auto"}
    command = ["launch/mpirun.sh", "-n", "4", "-m", "tests.world.several_hosts"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if "no shared memory" in line]
    assert said == ["pipemoe: no shared memory between the ranks, so MPI moves their rows: the ranks are on 2 hosts"]
    assert sum("sums are the same" in line for line in done.stderr.splitlines()) == 4
