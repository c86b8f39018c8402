"""The scripts that make results on GPUs run benchmarks that are there; stand-ins take the launchers' places."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_MAKERS = {"one_gpu.sh": [], "several_gpus.sh": ["2"]}


@pytest.mark.parametrize("maker", _MAKERS)
def test_every_part_runs_a_benchmark_that_is_there(maker, tmp_path):
    (tmp_path / "benchmarks").symlink_to(_ROOT / "benchmarks")
    launch = tmp_path / "launch"
    launch.mkdir()
    (launch / "environment.sh").symlink_to(_ROOT / "launch" / "environment.sh")
    _program(launch / "one_gpu.sh", f'echo "$2" >>{tmp_path}/commands')
    _program(launch / "gpu_ranks.sh", f'echo "$2" >>{tmp_path}/commands')
    _program(tmp_path / "bin" / "nvidia-smi", "echo 81920")
    _program(tmp_path / "bin" / "python", f'[ -e "$1" ] && echo "$1" >>{tmp_path}/commands')
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PIPEMOE_")},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PIPEMOE_PYTHON": str(tmp_path / "bin" / "python"),
        "PIPEMOE_BENCH_BEFORE": str(tmp_path),
    }
    made = subprocess.run(
        ["bash", str(tmp_path / "benchmarks" / maker), *_MAKERS[maker], str(tmp_path / "results")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    commands = (tmp_path / "commands").read_text().split()
    assert {"benchmarks/ttft", "benchmarks/comm", "-m"} <= set(commands)
    assert maker != "one_gpu.sh" or commands.count("benchmarks/forward.py") == 3
    missing = [name for name in set(commands) - {"-m"} if not _runs(_ROOT / name)]
    assert not missing


def _runs(path: Path) -> bool:
    return path.is_file() or (path / "__main__.py").is_file()


def _program(path: Path, body: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
