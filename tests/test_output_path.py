"""Paths for results, refused before any work."""

from pathlib import Path

import pytest

from pipemoe.errors import InputError
from pipemoe.output_path import check_output_file, check_output_folder


def test_files(tmp_path):
    check_output_file("--out", tmp_path / "new.json")
    (tmp_path / "old").write_text("")
    check_output_file("--out", tmp_path / "old")
    check_output_file("--out", tmp_path / "a" / "b", may_make_folder=True)
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "a" / "b", "does not exist"), (tmp_path / "old" / "b", "is no directory")):
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
