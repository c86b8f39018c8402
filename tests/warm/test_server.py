"""Forked Python processes: what they are given is what a started one would be given, and they end as it would."""

import os
import select
import signal
import subprocess

import pytest

from tests.warm.server import NAME, stand_in


def run(*arguments: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([stand_in(), *arguments], capture_output=True, text=True, timeout=120, **settings)


def test_arguments_environment_folder_and_files(tmp_path):
    read, write = os.pipe()
    code = f"import os, sys; os.write({write}, b'there'); print(sys.argv, os.environ['A'], os.getcwd(), input())"
    done = run("-c", code, "x y", env=os.environ | {"A": "b"}, cwd=tmp_path, input="line\n", pass_fds=[write])
    assert (done.returncode, done.stdout) == (0, f"['-c', 'x y'] b {tmp_path} line\n"), done.stderr
    os.close(write)
    assert os.read(read, 100) == b"there" and os.read(read, 100) == b""  # nobody else has kept it open
    os.close(read)


def test_modules_and_scripts(tmp_path):
    (tmp_path / "beside.py").write_text("value = 5")
    (tmp_path / "script.py").write_text("import sys, beside; print(__name__, beside.value, sys.argv[1:])")
    expected = "__main__ 5 ['a']\n"
    assert run(str(tmp_path / "script.py"), "a").stdout == expected
    assert run("-m", "script", "a", cwd=tmp_path).stdout == expected


@pytest.mark.parametrize(
    ("code", "status"),
    [("pass", 0), ("import sys; sys.exit(3)", 3), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_status(code, status):
    done = run("-c", code)
    assert done.returncode == status and ("ZeroDivisionError" in done.stderr) == (status == 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both_processes(number):
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    process = subprocess.Popen(
        [stand_in(), "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, NAME: "x"}
    )
    assert process.stdout is not None
    forked = int(process.stdout.readline())
    with open(f"/proc/{forked}/comm") as name:
        assert name.read() == "x\n"
    ends = os.pidfd_open(forked)
    process.send_signal(number)
    assert process.wait(60) == -number
    assert select.select([ends], [], [], 60)[0]
    os.close(ends)
    process.stdout.close()


def test_files_keep_their_numbers_while_others_run():
    """The server has files of its own for each process; none is closed under a number that was asked for."""
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    others = [subprocess.Popen([stand_in(), "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert all(other.stdout is not None and other.stdout.readline() for other in others)
    open_all = 'for n in $(seq 4 40); do eval "exec $n>&1"; done; exec "$0" "$@"'
    code = "import os; [os.fstat(number) for number in range(4, 41)]"
    done = subprocess.run(["bash", "-c", open_all, stand_in(), "-c", code], capture_output=True, text=True, timeout=120)
    for other in others:
        other.kill()
        other.communicate()
    assert done.returncode == 0, done.stderr
