"""launch/mpirun.sh: two real ranks, and the command line it makes for each MPI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
MPIRUN = CHECKOUT / "launch" / "mpirun.sh"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

RANK_SCRIPT = """
import json, os, sys, time
from pathlib import Path
from mpi4py import MPI
world = MPI.COMM_WORLD
facts = {
    "rank": world.rank, "size": world.size, "arguments": sys.argv[1:], "sum": world.allreduce(world.rank + 1),
    "environment": {
        name: value for name, value in os.environ.items() if name.startswith(("OMP_", "CUDA_", "NCCL_", "PIPEMOE_"))
    },
}
Path(os.environ["FACTS"], f"{world.rank}.json").write_text(json.dumps(facts))
if "fail" in sys.argv and world.rank == 1:
    raise ValueError("rank 1 fails")
if "fail" in sys.argv:
    time.sleep(60)
"""


def heed_signals() -> None:
    """A shell cannot trap what it was started to ignore, as under nohup or in the background."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without what an outer launcher may have set."""
    ours = ("PIPEMOE_", "OMP_", "NUMBA_", "CUDA_", "NCCL_", "OMPI_", "PMI", "MPI_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**inherited, "PIPEMOE_PYTHON": sys.executable, **settings}


def run_ranks(folder: Path, *arguments: str, **settings: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """Run the script on two real ranks; returns the finished process and each rank's facts."""
    pytest.importorskip("mpi4py")
    script = folder / "script.py"
    script.write_text(RANK_SCRIPT)
    result = subprocess.run(
        [MPIRUN, "-n", "2", script, *arguments],
        env=clean_environment(FACTS=str(folder), **settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result, [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]


def test_two_ranks_see_each_other_and_the_settings(tmp_path):
    result, facts = run_ranks(tmp_path, "--text", "two words")
    assert result.returncode == 0, result.stderr
    assert [(fact["rank"], fact["size"], fact["sum"]) for fact in facts] == [(0, 2, 3), (1, 2, 3)]
    for fact in facts:
        assert fact["arguments"] == ["--text", "two words"]
        environment = fact["environment"]
        assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
        assert environment["NCCL_LAUNCH_ORDER_IMPLICIT"] == "0"
        assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
        assert environment["PIPEMOE_COMMAND"].startswith("launch/mpirun.sh -n 2 ")
        assert environment["PIPEMOE_COMMAND"].endswith(r"script.py --text two\ words")
        assert "NCCL_HOSTID" not in environment


def test_settings_of_the_user_stay(tmp_path):
    result, facts = run_ranks(tmp_path, OMP_NUM_THREADS="3", CUDA_DEVICE_MAX_CONNECTIONS="8", PIPEMOE_NCCL_HOSTIDS="1")
    assert result.returncode == 0, result.stderr
    environments = [fact["environment"] for fact in facts]
    assert {environment["OMP_NUM_THREADS"] for environment in environments} == {"3"}
    assert {environment["CUDA_DEVICE_MAX_CONNECTIONS"] for environment in environments} == {"8"}
    assert [environment["NCCL_HOSTID"] for environment in environments] == ["pipemoe-rank-0", "pipemoe-rank-1"]


def test_exception_on_one_rank_ends_all(tmp_path):
    start = time.monotonic()
    result, _ = run_ranks(tmp_path, "fail")
    assert result.returncode != 0
    assert "rank 1 fails" in result.stderr + result.stdout
    assert time.monotonic() - start < 30


def test_other_ranks_write_to_their_logs(tmp_path):
    logs = tmp_path / "logs"  # the launcher makes it
    result, _ = run_ranks(tmp_path, "fail", PIPEMOE_RANK_LOGS=str(logs))
    assert result.returncode != 0
    assert "rank 1 fails" in (logs / "rank1.log").read_text()
    assert not (logs / "rank0.log").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-n"],
        ["-n", "two", "script.py"],
        ["-n", "0", "script.py"],
        ["-n", "2"],
        ["-n", "2", "-m"],
        ["-n", "2", "-x", "y"],
    ],
)
def test_bad_command_line_shows_usage(arguments):
    result = subprocess.run([MPIRUN, *arguments], capture_output=True, text=True, env=clean_environment(), timeout=20)
    assert result.returncode == 2
    assert "usage: launch/mpirun.sh" in result.stderr


def printed_command(folder: Path, version: str, *options: str, **settings: str) -> list[str]:
    """The arguments that a stand-in mpirun of `version` is given."""
    mpirun = folder / "mpirun"
    answer = f'[ "$1" != --version ] || {{ echo "{version}"; exit; }}'
    mpirun.write_text(f'#!/usr/bin/env bash\n{answer}\nprintf "%s\\n" "$@"\n')
    mpirun.chmod(0o755)
    result = subprocess.run(
        [MPIRUN, "-n", "4", *options, "-m", "module", "one two"],
        env=clean_environment(PIPEMOE_MPIRUN=str(mpirun), **settings),
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


COMMAND = [
    "bash",
    str(CHECKOUT / "pipemoe" / "launch" / "rank.sh"),
    sys.executable,
    "-m",
    "mpi4py",
    "-m",
    "module",
    "one two",
]


def test_open_mpi_may_oversubscribe_binds_nothing_and_forwards_settings(tmp_path):
    command = printed_command(tmp_path, "mpirun (Open MPI) 4.1.6", NCCL_MAX_CTAS="4")
    assert command[:5] == ["-n", "4", "--oversubscribe", "--bind-to", "none"]
    assert ("--allow-run-as-root" in command) == (os.geteuid() == 0)
    forwarded = {name for flag, name in zip(command, command[1:], strict=False) if flag == "-x"}
    assert {
        "NCCL_MAX_CTAS",
        "OMP_NUM_THREADS",
        "PIPEMOE_COMMAND",
        "PYTHONPATH",
        "CUDA_DEVICE_MAX_CONNECTIONS",
    } <= forwarded
    assert command[-len(COMMAND) :] == COMMAND


def test_mpich_needs_no_flags(tmp_path):
    assert printed_command(tmp_path, "HYDRA build details:") == ["-n", "4", *COMMAND]


def test_hosts_are_given_as_each_mpi_wants_them(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\nfirst\nsecond\n")
    mpich = printed_command(tmp_path, "HYDRA build details:", "--hostfile", str(hosts))
    assert mpich == ["-n", "4", "-f", str(hosts), *COMMAND]
    open_mpi = printed_command(
        tmp_path, "mpirun (Open MPI) 4.1.6", "--hostfile", str(hosts), PIPEMOE_MPIRUN_FLAGS="-v -q"
    )
    assert open_mpi[open_mpi.index("--hostfile") + 1] == str(hosts)
    assert open_mpi[-len(COMMAND) - 2 : -len(COMMAND)] == ["-v", "-q"]


def test_unknown_mpirun_is_named(tmp_path):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/usr/bin/env bash\necho some other launcher 1.0\n")
    mpirun.chmod(0o755)
    environment = clean_environment(PIPEMOE_MPIRUN=str(mpirun))
    result = subprocess.run([MPIRUN, "-n", "2", "x.py"], env=environment, capture_output=True, text=True, timeout=20)
    assert result.returncode == 1
    assert "neither Open MPI nor MPICH: some other launcher 1.0" in result.stderr
