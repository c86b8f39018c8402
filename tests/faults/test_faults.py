"""Faults that end a step for good: every survivor says what happened on which rank and ends in time; nothing is left behind."""

from __future__ import annotations

import os
import re
import subprocess
import time
import uuid
from pathlib import Path

import pytest
import torch

from tests.faults.ranks import WATCHDOG_SECONDS

ROOT = Path(__file__).parents[2]
# Ranks start and import for some seconds; what is tested is that they end well before this.
START_SECONDS = 60

# fault: what survivors say (a launcher may end one before it has; not those of "kill", which are out of its reach)
FAULTS = {
    "kill": r"lost rank 1 \(",
    "stop": r"no progress for \d+\.\d s in .*rank 1: step \d+, .* heard [1-9]",
    "barrier": r"no progress for \d+\.\d s in .*",
    "transport": r"rank 1: OSError in .*planted in the transport",
    "engine": r"rank 1: ValueError in .*planted in the engine",
    "plan": r"rank 1 follows another plan than rank 0",
    "absent": r"no progress for \d+\.\d s in exchange of step 2; peers: .*rank 1: step 1, .*idle",
    "exit": r"rank 1 has closed its world, but exchange of step 2 needs every rank",
}


def processes_with(token: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and token.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# Ranks take seconds to start, and one survivor is enough, but where the launcher does not end the others for it.
NUM_RANKS = dict.fromkeys(FAULTS, 2) | {"kill": 3, "stop": 3}


@pytest.mark.parametrize("fault", FAULTS)
def test_survivors_end_with_the_reason(fault, tmp_path):
    token = f"fault-{uuid.uuid4().hex}"
    environment = {**os.environ, "PIPEMOE_FAULT_TOKEN": token, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    launcher = ["launch/gpu_ranks.sh"] if torch.cuda.is_available() else ["launch/mpirun.sh", "-n"]
    command = [*launcher, str(NUM_RANKS[fault]), "-m", "tests.faults.ranks", fault, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS + 5 * WATCHDOG_SECONDS)
    assert done.returncode != 0, done.stdout + done.stderr
    assert "survived" not in done.stdout
    deadline = time.monotonic() + 5 * WATCHDOG_SECONDS
    while (left := processes_with(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"processes left behind: {left}"
    said = {path.name: path.read_text() for path in tmp_path.iterdir()}
    reasons = [line for text in said.values() for line in text.splitlines() if line.startswith("pipemoe: ")]
    assert any(re.search(FAULTS[fault], line) for line in reasons), said
    if fault == "kill":  # out of the launcher's reach: the survivors ended by themselves, each with a reason
        assert "pipemoe: " in said["rank0"] and "pipemoe: " in said["rank2"], said
