"""The shell scripts: every one parses, passes shellcheck where that is installed, and can be run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(CHECKOUT / "launch").iterdir(), *(CHECKOUT / "benchmarks").glob("*.sh"), CHECKOUT / ".ci" / "run"])
SOURCED = {"environment.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck():
    result = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=CHECKOUT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.name not in SOURCED], ids=lambda path: path.name)
def test_script_can_be_run(script):
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
