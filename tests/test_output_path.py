"""Files for results: refused before any work, and written whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipemoe import output_path
from pipemoe.errors import InputError
from pipemoe.output_path import check_output_file, check_output_folder, write_whole


def test_files(tmp_path):
    check_output_file("--out", tmp_path / "new.json")
    (tmp_path / "old").write_text("")
    check_output_file("--out", tmp_path / "old")
    check_output_file("--out", tmp_path / "a" / "b", may_make_folder=True)
    for path, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "a" / "b", "does not exist"),
        (tmp_path / "old" / "b", "is no directory"),
    ):
        with pytest.raises(InputError, match=message):
            check_output_file("--out", path)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_folders(tmp_path):
    check_output_folder("--out", tmp_path)
    check_output_folder("--out", tmp_path / "a" / "b")
    (tmp_path / "old").write_text("")
    for path in (tmp_path / "old", tmp_path / "old" / "b"):
        with pytest.raises(InputError, match="--out .* is no directory"):
            check_output_folder("--out", path)


def test_paths_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pipemoe.output_path.os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match="may not be written to"):
        check_output_file("--out", tmp_path / "new.json")


def test_what_the_system_says_of_a_path_is_said_in_words(tmp_path):
    with pytest.raises(InputError, match="--out .*(?i:name too long)"):
        check_output_file("--out", tmp_path / ("n" * 300))
    with pytest.raises(InputError, match="is no file"):
        check_output_file("--out", Path("/dev/null"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "made" / ("n" * 255)
    write_whole(target, "old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_whole(link, b"new")
    assert target.read_bytes() == b"new" and link.is_symlink()
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, failing):
    target = tmp_path / "results.json"
    target.write_text("old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "write":
        opened = open

        def half(path, mode):
            file = opened(path, mode)
            return type(
                "Half",
                (),
                {
                    "__enter__": lambda self: self,
                    "__exit__": lambda self, *_: file.close(),
                    "write": lambda self, data: (file.write(data[:3]), full()),
                },
            )()

        monkeypatch.setattr(output_path, "open", half, raising=False)
    else:
        monkeypatch.setattr(*{"fsync": (output_path.os, "fsync"), "replace": (Path, "replace")}[failing], full)
    with pytest.raises(
        InputError,
        match="results.json: No space left on device; it was not written, and what was there before is as it was",
    ):
        write_whole(target, "new content")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
{program}
"""
PLAN = """
from pipemoe.cli import main
arguments = ["plan", "--model", "small", "--rank-tokens", "50,3", "--layers", "3"]
main(arguments)  # it compiles, and keeps what it compiled in files
limit()
sys.exit(main([*arguments, "--trace", "out.json"]))
"""
COST = """
limit()
from pipemoe.plan.cost.file import write_cost
from pipemoe.plan.cost.model import CostModel
write_cost('out.json', {'a': 'b' * 3000}, CostModel())
"""
RESULTS = """
limit()
from benchmarks import results_schema
results_schema.validate = lambda document: None
results_schema.write_results({'a': 'b' * 3000}, 'out.json')
"""


@pytest.mark.parametrize("program", [PLAN, COST, RESULTS], ids=["plan", "cost", "results"])
def test_a_limit_on_the_size_of_files(tmp_path, program):
    """A real failure of the system, of every writer, in a process of its own: a sentence, no half of a file, a status
    that is not 0.
    """
    checkout = Path(__file__).resolve().parent.parent
    script = LIMITED.format(paths=[str(checkout), str(checkout / "benchmarks")], program=program)
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert "out.json: File too large; it was not written" in found.stderr and found.returncode != 0
    assert list(tmp_path.iterdir()) == []
    if program is PLAN:
        assert "Traceback" not in found.stderr and found.returncode == 2


def test_standard_output_that_is_full():
    """/dev/full takes nothing. (That it compiles is said on standard error, where it does.)"""
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "pipemoe.cli", "plan", "--model", "small", "--rank-tokens", "5,3", "--layers", "3"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert found.returncode == 2
    assert (
        found.stderr.endswith("pipemoe plan: output: No space left on device; what was printed is not complete\n")
        and "Traceback" not in found.stderr
    )
