"""launch/one_gpu.sh against a stand-in GPU: its settings, and that its MPS always ends."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.test_mpirun import SIGNALS, heed_signals

CHECKOUT = Path(__file__).resolve().parents[2]
ONE_GPU = CHECKOUT / "launch" / "one_gpu.sh"

# Each stand-in is a program of that name on PATH; MPS's keeps a file while it "runs".
PROGRAMS = {
    "nvidia-smi": '[ "$1" != -L ] || echo "GPU 0: stand-in"',
    "nvidia-cuda-mps-control": """
if [ "${1:-}" = -d ]; then
    echo "$CUDA_MPS_PIPE_DIRECTORY" >"$STATE/mps"
    [ -z "${SERVER:-}" ] || { nvidia-cuda-mps-server 60 </dev/null >/dev/null 2>&1 & echo $! >"$STATE/server"; }
else
    read -r order && [ "${order%% *}" = quit ] && rm "$STATE/mps"
fi""",
    # Answers the question about NCCL; other runs do what the test wants of a rank.
    "python": """
[ "$1" != -c ] || { echo "$NCCL 132"; exit; }
env >"$STATE/environment"
[ -f "$STATE/mps" ] || exit 99
[ "$RANK_ACTION" != read ] || read -r RANK_ACTION
[ "$RANK_ACTION" = wait ] || exit "$RANK_ACTION"
sleep 60 &
trap 'kill $!; exit 143' TERM
touch "$STATE/started"
wait $! """,
    "mpirun": """
[ "$1" != --version ] || { echo HYDRA; exit; }
shift 2
exec "$@" """,
}


@pytest.fixture
def start(tmp_path):
    """start(num_ranks, action, nccl=..., **settings) -> the running launcher; `action`: a status, wait, or read."""
    for name, text in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/usr/bin/env bash\n{text}\n")
        program.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    running = []

    def start(num_ranks: int, action: str, nccl: str = "23007", **settings: str) -> subprocess.Popen:
        ours = ("PIPEMOE_", "NCCL_", "CUDA_", "OMP_", "NUMBA_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {
            "PATH": f"{tmp_path}:{environment['PATH']}",
            "PIPEMOE_PYTHON": str(tmp_path / "python"),
            "PIPEMOE_MPIRUN": str(tmp_path / "mpirun"),
            "STATE": str(tmp_path),
            "TMPDIR": str(tmp_path / "tmp"),
            "NCCL": nccl,
            "RANK_ACTION": action,
            **settings,
        }
        command = [ONE_GPU, str(num_ranks), "script.py"]
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=heed_signals,
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def seen_environment(folder: Path) -> dict[str, str]:
    lines = (folder / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def assert_mps_ended(folder: Path) -> None:
    assert not (folder / "mps").exists()
    assert list((folder / "tmp").iterdir()) == []


def test_the_ranks_read_the_launchers_input(start, tmp_path):
    process = start(2, "read")
    _, errors = process.communicate("7\n", timeout=30)
    assert process.returncode == 7, errors
    assert_mps_ended(tmp_path)


def test_new_nccl_shares_the_gpu(start, tmp_path):
    process = start(4, "0")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    environment = seen_environment(tmp_path)
    assert environment["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    assert environment["NCCL_NVLS_ENABLE"] == "0"
    assert environment["NCCL_MAX_CTAS"] == "1"  # 4 ranks x 2 x 2 slots x 1 = 16 of a rank's 32
    assert environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
    assert environment["PIPEMOE_NUM_SLOTS"] == "2"
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "12"  # 5 x 2 + 2
    assert environment["PIPEMOE_COMMAND"] == "launch/one_gpu.sh 4 script.py"
    assert "NCCL_HOSTID" not in environment
    assert_mps_ended(tmp_path)


def test_more_hardware_queues_than_mps_has_are_refused(start, tmp_path):
    """Else every rank's first CUDA call would say that memory is out."""
    process = start(4, "0", CUDA_DEVICE_MAX_CONNECTIONS="32")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "4 ranks x CUDA_DEVICE_MAX_CONNECTIONS=32 are 128 hardware queues" in errors and "unset it" in errors
    assert not (tmp_path / "environment").exists()
    assert start(3, "0", CUDA_DEVICE_MAX_CONNECTIONS="32").wait(30) == 0


def test_no_server_of_mps_is_left(start, tmp_path):
    """The stand-in's server is told nothing, like one whose client hangs; a job beside this one keeps its own."""
    (tmp_path / "nvidia-cuda-mps-server").symlink_to(shutil.which("sleep"))
    other = subprocess.Popen([tmp_path / "nvidia-cuda-mps-server", "60"], env={"CUDA_MPS_PIPE_DIRECTORY": "/other"})
    try:
        process = start(2, "0", SERVER="yes")
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        server = int((tmp_path / "server").read_text())
        assert not is_running(server)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_older_nccl_goes_over_loopback(start, tmp_path):
    process = start(8, "0", nccl="22809")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    environment = seen_environment(tmp_path)
    assert environment["NCCL_HOSTID"].startswith("pipemoe-rank-")
    assert environment["NCCL_NET"] == "Socket"
    assert environment["NCCL_SOCKET_IFNAME"] == "lo"
    assert environment["NCCL_IB_DISABLE"] == "1"
    assert environment["NCCL_MAX_CTAS"] == "2"  # 8 ranks x 2 x 2 slots x 2 = 64 of 131
    assert environment["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "100"
    assert "NCCL_MULTI_RANK_GPU_ENABLE" not in environment


def test_status_is_that_of_the_command(start, tmp_path):
    process = start(2, "7")
    process.communicate(timeout=30)
    assert process.returncode == 7
    assert_mps_ended(tmp_path)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_ends_the_command_and_mps(start, tmp_path, number):
    process = start(2, "wait")
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 143
    assert_mps_ended(tmp_path)


@pytest.mark.parametrize(
    "settings, complaint",
    [
        ({"NCCL_MAX_CTAS": "8"}, "exceeds half of a rank's 32 SMs: at most 1"),
        ({"PIPEMOE_NUM_SLOTS": "40"}, "fewer ranks, a larger share, or fewer slots"),
    ],
)
def test_blocks_that_do_not_fit_are_refused_before_mps_starts(start, tmp_path, settings, complaint):
    process = start(4, "0", **settings)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert complaint in errors
    assert not (tmp_path / "environment").exists()
    assert_mps_ended(tmp_path)
