"""`pipemoe run`, from a pipemoe that is installed: no checkout is near."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from pathlib import Path
import pipemoe
from mpi4py import MPI
world = MPI.COMM_WORLD
where = Path(pipemoe.__file__).parents[1]
(Path(sys.argv[1]) / f"rank{world.rank}").write_text(f"{world.allreduce(world.rank + 1)} {where} {sys.argv[2:]}")
sys.exit(3 if "fail" in sys.argv and world.rank else 0)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the installed packages, and nothing else of the checkout."""
    pytest.importorskip("setuptools")
    if not (CHECKOUT / ".git").exists():
        pytest.skip("no git checkout, so nothing says which files belong to it")
    folder = tmp_path_factory.mktemp("site")
    tree = tmp_path_factory.mktemp("tree")  # building leaves files in the tree that it builds
    files = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=True).stdout
    subprocess.run(["cp", "--parents", "-P", *files.decode().strip("\0").split("\0"), tree], cwd=CHECKOUT, check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", folder, tree]
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    return folder


def run(installed: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIPEMOE_", "OMP_", "PMI", "MPI"))
    }
    return subprocess.run(
        [sys.executable, "-m", "pipemoe", "run", *map(str, arguments)],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_installed_pipemoe_starts_ranks(installed, tmp_path):
    pytest.importorskip("mpi4py")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run(installed, tmp_path, "-n", 2, "script.py", tmp_path, "-n", "two words", "--help")
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == f"3 {installed} ['-n', 'two words', '--help']"
    assert run(installed, tmp_path, "-n", 2, "script.py", tmp_path, "fail").returncode == 3


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "usage: pipemoe run [--one-gpu] -n N"),
        ([], 2, "usage: pipemoe run [--one-gpu] -n N"),
        (["-n", "none", "script.py"], 2, "usage: pipemoe run -n N"),
        (["-n", "2"], 2, "usage: pipemoe run -n N"),
        (["--one-gpu", "script.py"], 2, "--one-gpu is followed by -n N"),
        (["--one-gpu", "-n", "x", "script.py"], 2, "usage: pipemoe run --one-gpu -n N"),
    ],
)
def test_usage(installed, tmp_path, arguments, status, said):
    done = run(installed, tmp_path, *arguments)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stderr
