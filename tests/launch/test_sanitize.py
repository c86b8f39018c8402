"""launch/sanitize.sh against a stand-in compute-sanitizer: what it runs, its exit status, and what it says where there
is none.
"""

import os
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = CHECKOUT / "launch" / "sanitize.sh"
HAS_TOOLKIT = Path("/usr/local/cuda/bin/compute-sanitizer").exists()


def run(path: str, *tools: str, **environment: str) -> subprocess.CompletedProcess:
    settings = {**os.environ, "PATH": path, "PIPEMOE_PYTHON": "/bin/true", **environment}
    return subprocess.run([str(SCRIPT), *tools], env=settings, capture_output=True, text=True, timeout=60)


@pytest.fixture
def tool(tmp_path):
    """PATH with a compute-sanitizer that prints its words, and fails on racecheck."""
    file = tmp_path / "compute-sanitizer"
    file.write_text('#!/bin/sh\necho "$@"\n[ "$2" != racecheck ]\n')
    file.chmod(0o755)
    return f"{tmp_path}:/usr/bin:/bin"


def test_every_tool_runs_all_families(tool):
    done = run(tool, "memcheck", "synccheck", PIPEMOE_SANITIZER_FAMILIES="index or routing")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("--tool")]
    assert [line.split()[1] for line in lines] == ["memcheck", "synccheck"]
    assert all("-k index or routing tests/kernels/sanitizer_cases.py" in line for line in lines)


def test_a_tool_that_finds_something_fails(tool):
    done = run(tool)
    assert done.returncode == 1 and "FAILED: racecheck" in done.stdout


@pytest.mark.skipif(HAS_TOOLKIT, reason="this machine has one")
def test_without_one_it_says_so():
    done = run("/usr/bin:/bin")
    assert done.returncode == 0 and "nothing checked" in done.stderr
