"""Every benchmark that is a script runs as one, from any folder, and by `python -m`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    path for path in (CHECKOUT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in path.read_text()
)


def command_of(path: Path) -> str:
    """What a user names: a package's folder for its __main__.py."""
    return str(path.parent if path.name == "__main__.py" else path)


def helped(words: list[str], folder: Path) -> str:
    # Uninstalled as well: kernels/ is not on the path of an interpreter that nobody prepared.
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT / "kernels")}
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=[str(p.relative_to(CHECKOUT / "benchmarks")) for p in SCRIPTS])
def test_runs_as_a_script(path, tmp_path):
    assert "usage:" in helped([command_of(path)], tmp_path)


@pytest.mark.parametrize("name", ["ttft", "kernels", "comm", "memory"])
def test_runs_by_name(name):
    assert "usage:" in helped(["-m", f"benchmarks.{name}"], CHECKOUT)
