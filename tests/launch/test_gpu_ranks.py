"""launch/gpu_ranks.sh: a GPU for every rank where there are as many, else all ranks on one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def run(folder: Path, num_gpus: int, *arguments: str) -> subprocess.CompletedProcess:
    """Run a copy of the launcher beside stand-ins for those it calls, on a machine with `num_gpus`."""
    for name in ("gpu_ranks.sh", "environment.sh"):
        shutil.copy(LAUNCH / name, folder / name)
    gpus = "".join(f'echo "GPU {index}: stand-in"\n' for index in range(num_gpus))
    programs = {"nvidia-smi": gpus, "mpirun.sh": 'echo "mpirun.sh $*"\n', "one_gpu.sh": 'echo "one_gpu.sh $*"\n'}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PIPEMOE_PYTHON": "bash"}
    return subprocess.run(
        [folder / "gpu_ranks.sh", *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "num_gpus, became",
    [
        (8, "mpirun.sh -n 4 -m module --fast"),
        (4, "mpirun.sh -n 4 -m module --fast"),
        (3, "one_gpu.sh 4 -m module --fast"),
        (1, "one_gpu.sh 4 -m module --fast"),
    ],
)
def test_a_gpu_each_where_there_are_as_many(tmp_path, num_gpus, became):
    done = run(tmp_path, num_gpus, "4", "-m", "module", "--fast")
    assert (done.returncode, done.stdout.strip()) == (0, became), done.stderr


@pytest.mark.parametrize("arguments", [[], ["4"], ["0", "script.py"], ["many", "script.py"]])
def test_bad_arguments(tmp_path, arguments):
    done = run(tmp_path, 1, *arguments)
    assert done.returncode == 2 and "usage" in done.stderr
