"""`pipemoe doctor`: healthy here, and each fault that it knows, planted."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pipemoe import doctor
from pipemoe.cli import main

CHECKOUT = Path(__file__).resolve().parents[2]
H200 = doctor.Gpu("NVIDIA H200", "580.95", 143771, 132)


def statuses(findings):
    return {finding.subject: finding.status for finding in findings}


def the_one(findings):
    (finding,) = findings
    return finding


@pytest.fixture
def executable(tmp_path):
    """executable(name, output) -> path of a program that prints `output`."""

    def executable(name: str, output: str) -> str:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\ncat <<'E'\n{output}\nE\n")
        program.chmod(0o755)
        return str(program)

    return executable


def test_doctor_runs_by_itself_and_prints_json():
    """A process of its own: the doctor must not depend on what tests have imported."""
    command = [sys.executable, "-m", "pipemoe.cli", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    document = json.loads(result.stdout)
    subjects = {finding["subject"] for finding in document["findings"]}
    assert {"Python", "torch", "numpy", "numba", "safetensors", "/dev/shm"} <= subjects
    assert document["healthy"] == (result.returncode == 0)
    assert all(finding["action"] for finding in document["findings"] if finding["status"] != "OK")


def test_a_fault_makes_the_exit_status_1(monkeypatch, capsys):
    finding = doctor.Finding("thing", "FAIL", "broken", "mend it")
    monkeypatch.setattr(doctor, "examine", lambda **_: [finding, doctor.Finding("other", "OK", "fine")])
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "FAIL  thing  broken",
        "             -> mend it",
        "OK    other  fine",
    ]
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["healthy"] is False


def test_slots_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--slots", "0"])
    assert "0 is not a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("version, status", [("2.4.6", "OK"), ("2.5.0", "FAIL"), (None, "FAIL")])
def test_numpy_must_be_older_than_2_5(monkeypatch, version, status):
    monkeypatch.setattr(doctor, "installed_version", lambda name: version if name == "numpy" else "1.0")
    assert statuses(doctor.check_packages())["numpy"] == status


def test_missing_optional_packages_are_warnings(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "mpi4py" else "1.0")
    found = statuses(doctor.check_packages())
    assert found["mpi4py"] == "WARN" and found["transformers"] == "OK"


def test_gpus_are_read_from_nvidia_smi(monkeypatch, executable, tmp_path):
    executable("nvidia-smi", "NVIDIA H200, 580.95, 143771\nNVIDIA H200, 580.95, 143771")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpus = doctor.installed_gpus()
    assert [(gpu.name, gpu.driver, gpu.memory_mib) for gpu in gpus] == [("NVIDIA H200", "580.95", 143771)] * 2


def test_broken_driver_lists_no_gpu(monkeypatch, executable, tmp_path):
    executable("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver, sorry.")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert doctor.installed_gpus() == []


def test_cpu_build_of_torch_beside_a_gpu_is_a_fault(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    found = statuses(doctor.check_gpus([H200]))
    assert found["driver"] == "OK" and found["torch and CUDA"] == "FAIL"
    old = doctor.Gpu("NVIDIA A100", "470.10", 40000, 108)
    assert statuses(doctor.check_gpus([old]))["driver"] == "FAIL"


def stand_in_nccl(monkeypatch, **attributes):
    cupy, cuda = types.ModuleType("cupy"), types.ModuleType("cupy.cuda")
    cuda.nccl = types.SimpleNamespace(**attributes)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)


def test_two_loaded_libnccl_are_a_fault(monkeypatch):
    stand_in_nccl(monkeypatch, available=True, get_version=lambda: 23007)
    libraries = ["/a/libnccl.so.2", "/b/libnccl.so.2"]
    monkeypatch.setattr(doctor, "loaded_libraries", lambda name: libraries)
    found = {finding.subject: finding for finding in doctor.check_nccl([H200], 4)}
    assert (found["NCCL"].status, found["NCCL"].seen) == ("OK", "2.30.7")
    assert found["libnccl"].status == "FAIL" and "/b/libnccl.so.2" in found["libnccl"].seen
    libraries.pop()
    assert statuses(doctor.check_nccl([H200], 4))["libnccl"] == "OK"


def test_two_wheels_of_nccl_are_a_fault(monkeypatch):
    """Each writes nvidia/nccl/lib/libnccl.so.2."""
    versions = {"nvidia-nccl-cu12": "2.28.9", "nvidia-nccl-cu13": "2.32.3"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.setattr(doctor, "installed_gpus", lambda: [H200])
    (finding,) = (finding for finding in doctor.examine() if finding.subject == "NCCL wheels")
    assert finding.status == "FAIL" and "nvidia-nccl-cu12 2.28.9 and nvidia-nccl-cu13 2.32.3" in finding.seen
    assert "pip uninstall -y nvidia-nccl-cu12 nvidia-nccl-cu13" in finding.action
    assert doctor.check_nccl_wheels([]) == []
    del versions["nvidia-nccl-cu12"]
    assert doctor.check_nccl_wheels([H200]) == []


def test_old_nccl_is_a_warning_only_for_shared_gpus(monkeypatch):
    stand_in_nccl(monkeypatch, available=True, get_version=lambda: 22809)
    assert statuses(doctor.check_nccl([H200], 1))["NCCL"] == "OK"
    assert statuses(doctor.check_nccl([H200], 4))["NCCL"] == "WARN"


def test_cupy_without_nccl_is_a_fault(monkeypatch):
    stand_in_nccl(monkeypatch, available=False)
    assert statuses(doctor.check_nccl([H200], 1)) == {"NCCL": "FAIL"}
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert "pipemoe[cuda13]" in the_one(doctor.check_nccl([H200], 1)).action


@pytest.mark.parametrize(
    "setting, slots, ranks_per_gpu, status",
    [
        ("2", 4, 4, "OK"),
        ("3", 4, 4, "FAIL"),
        ("8", 4, 1, "OK"),
        ("", 4, 1, "OK"),
        ("", 32, 1, "OK"),
        ("", 33, 1, "FAIL"),
        ("1", 17, 4, "FAIL"),
    ],
)
def test_room_for_thread_blocks(monkeypatch, setting, slots, ranks_per_gpu, status):
    monkeypatch.setenv("NCCL_MAX_CTAS", setting)
    finding = the_one(doctor.check_room([H200], slots, ranks_per_gpu))
    assert finding.status == status
    assert bool(finding.action) == (status != "OK")


def test_mps_is_wanted_for_shared_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert the_one(doctor.check_mps([H200], 1)).status == "OK"
    assert the_one(doctor.check_mps([H200], 4)).status == "WARN"


@pytest.mark.parametrize("setting, status", [("16", "OK"), ("", "OK"), ("1", "FAIL"), ("32", "OK"), ("many", "FAIL")])
def test_connections(monkeypatch, setting, status):
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", setting)
    assert the_one(doctor.check_connections([H200])).status == status


def stand_in_mpi(monkeypatch, library: str):
    mpi4py = types.ModuleType("mpi4py")
    mpi4py.rc = types.SimpleNamespace(initialize=True)
    mpi4py.MPI = types.SimpleNamespace(Get_library_version=lambda: library)
    monkeypatch.setitem(sys.modules, "mpi4py", mpi4py)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "4.1.2")


@pytest.mark.parametrize(
    "library, printed, status",
    [
        ("Open MPI v4.1.6, package: x", "mpirun (Open MPI) 4.1.6", "OK"),
        ("MPICH Version:\t5.0.2\nmore", "HYDRA build details:\n Version: 5.0.2", "OK"),
        ("MPICH Version:\t5.0.2\nmore", "mpirun (Open MPI) 4.1.6", "FAIL"),
        ("Open MPI v4.1.6, package: x", "slurm something", "FAIL"),
    ],
)
def test_mpirun_must_be_of_the_same_mpi(monkeypatch, executable, library, printed, status):
    stand_in_mpi(monkeypatch, library)
    monkeypatch.setenv("PIPEMOE_MPIRUN", executable("mpirun", printed))
    found = statuses(doctor.check_mpi())
    assert found == {"MPI": "OK", "mpirun": status}


def test_missing_mpirun_is_a_fault(monkeypatch):
    stand_in_mpi(monkeypatch, "MPICH Version:\t5.0.2")
    monkeypatch.delenv("PIPEMOE_MPIRUN", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda *_, **__: None)
    assert statuses(doctor.check_mpi())["mpirun"] == "FAIL"


def test_loaded_libraries_are_found_by_name():
    (libc,) = doctor.loaded_libraries("libc.so")
    assert Path(libc).exists()
    assert doctor.loaded_libraries("libnothing.so") == []


def test_little_shared_memory_is_named(monkeypatch):
    def of(size: int):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(total=size))
        return the_one(doctor.check_shared_memory())

    assert of(1 << 20).status == "FAIL" and "5 MiB for each rank" in of(1 << 20).action
    assert of(64 << 20).status == "WARN" and of(2 << 30).status == "OK"


@pytest.mark.parametrize(
    ("wanted", "refused", "status", "seen"),
    [
        ("auto", None, "OK", "shared memory"),
        ("mpi", None, "OK", "MPI"),
        ("auto", "no memory today", "WARN", "MPI: no memory today"),
        ("shared", "no memory today", "FAIL", "MPI: no memory today"),
        ("other", None, "FAIL", "other"),
    ],
)
def test_the_hosts_transport_is_named(monkeypatch, wanted, refused, status, seen):
    monkeypatch.setenv("PIPEMOE_HOST_TRANSPORT", wanted)
    monkeypatch.setattr("pipemoe.comm.shared.memory.refusal", lambda: refused)
    finding = the_one(doctor.check_host_transport())
    assert finding.status == status and seen in finding.seen


def test_segments_that_no_process_uses_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "old_segments", list)
    assert doctor.check_old_segments() == []
    left = [tmp_path / f"mpich_shm_{i}" for i in range(25)]
    for path in left:
        path.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(doctor, "old_segments", lambda: left)
    finding = the_one(doctor.check_old_segments())
    assert (finding.status, finding.seen) == ("WARN", "25 files of MPI that no process has mapped, 25 MiB")
    assert f"rm {left[0]} " in finding.action and "and 5 more" in finding.action
