from __future__ import annotations

import json
import math
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import results_schema
from pipemoe.errors import InputError

CHECKOUT = Path(__file__).resolve().parents[2]

ROW = {
    "mode": "per_rank",
    "model": "qwen3",
    "layers": 8,
    "num_ranks": 4,
    "rank_tokens": [4096, 16, 16, 16],
    "ttft_ms_p50": 1.5,
    "ttft_ms_p99": 2,
    "ttft_ms_slowest_rank": 3.0,
    "ttft_ms_median_rank": 1.0,
    "exposed_comm_ms": None,
    "overlap_pct": 80.0,
    "peak_workspace_bytes": 1 << 20,
    "parity": True,
}


@pytest.fixture
def document():
    return results_schema.results_document("ttft", [ROW])


def test_document_goes_to_disk_and_back(document, tmp_path):
    path = tmp_path / "deep" / "ttft.json"
    results_schema.write_results(document, path)
    assert results_schema.read_results(path) == document
    assert [file.name for file in path.parent.iterdir()] == ["ttft.json"]
    assert list(document) == ["schema", "benchmark", "command", "commit", "machine", "rows"]


def test_print_is_one_line_of_json(document, capsys):
    results_schema.print_results(document)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == document


def test_numbers_that_json_lacks_become_null():
    row = {**ROW, "ttft_ms_p99": math.nan, "overlap_pct": np.float32("inf"), "layers": np.int64(8), "ttfts": np.ones(2)}
    (cleaned,) = results_schema.results_document("ttft", [row])["rows"]
    assert cleaned["ttft_ms_p99"] is None and cleaned["overlap_pct"] is None
    assert cleaned["layers"] == 8 and type(cleaned["layers"]) is int
    assert cleaned["ttfts"] == [1.0, 1.0]


@pytest.mark.parametrize("field", ROW)
def test_missing_and_mistyped_row_fields_are_named(document, field):
    document["rows"] = [ROW, {name: value for name, value in ROW.items() if name != field}]
    with pytest.raises(InputError, match=f"row 1: no '{field}'"):
        results_schema.validate(document)
    document["rows"] = [{**ROW, field: {}}]
    with pytest.raises(InputError, match=f"row 0: '{field}' is"):
        results_schema.validate(document)


def test_true_is_no_number(document):
    document["rows"] = [{**ROW, "layers": True}]
    with pytest.raises(InputError, match="'layers' is True, not int"):
        results_schema.validate(document)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"schema": "pipemoe.bench/2"}, "not 'pipemoe.bench/1'"),
        ({"rows": {}}, "'rows' is {}, not list"),
        ({"rows": [3]}, "row 0: a int instead of an object"),
        ({"machine": None}, "'machine' is None, not dict"),
        ({"rows": [{**ROW, "ttft_ms_p50": math.nan}]}, "not JSON"),
    ],
)
def test_faulty_documents_are_refused(document, change, complaint):
    with pytest.raises(InputError) as error:
        results_schema.validate({**document, **change})
    assert complaint in str(error.value)


def test_all_faults_are_listed_at_once():
    with pytest.raises(InputError) as error:
        results_schema.validate({"schema": results_schema.SCHEMA, "benchmark": "ttft", "rows": [{}]})
    assert str(error.value).count("\n") == 2 + len(ROW)  # command, commit, machine and every field of the row


def test_unreadable_results_name_the_file(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{"schema": ')
    with pytest.raises(InputError, match="broken.json"):
        results_schema.read_results(path)


def test_benchmarks_without_fields_of_their_own_are_free():
    assert results_schema.results_document("comm", [{"size": 1}])["rows"] == [{"size": 1}]


def test_command_has_no_folders(monkeypatch):
    script = str(CHECKOUT / "benchmarks" / "ttft")
    words = ["launch/mpirun.sh", "-n", "2", script, "--model=/data/models/qwen", "/x/y.csv", "a b"]
    monkeypatch.setenv("PIPEMOE_COMMAND", shlex.join(words))
    assert results_schema.command() == "launch/mpirun.sh -n 2 benchmarks/ttft --model=qwen y.csv 'a b'"
    monkeypatch.delenv("PIPEMOE_COMMAND")
    monkeypatch.setattr(results_schema.sys, "argv", ["benchmarks/ttft", "--seed", "1"])
    assert results_schema.command() == "python benchmarks/ttft --seed 1"


def test_commit_is_that_of_the_checkout_or_given(monkeypatch):
    def no_git(*_, **__):
        raise subprocess.CalledProcessError(128, "git")

    monkeypatch.setattr(results_schema.subprocess, "run", no_git)
    monkeypatch.delenv("PIPEMOE_COMMIT", raising=False)
    assert results_schema.commit() is None
    monkeypatch.setenv("PIPEMOE_COMMIT", "abc")
    assert results_schema.commit() == "abc"


def test_machine_facts_name_neither_host_nor_paths(monkeypatch):
    monkeypatch.setenv("NCCL_TOPO_FILE", "/some/folder/topology.xml")
    facts = results_schema.machine()
    text = json.dumps(facts)
    assert facts["settings"]["NCCL_TOPO_FILE"] == "topology.xml"
    assert results_schema.platform.node() not in facts.values()
    assert "/some" not in text and str(Path.home()) not in text
    assert facts["num_cores"] >= 1 and facts["packages"]["numpy"]
