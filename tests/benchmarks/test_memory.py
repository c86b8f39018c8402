"""The memory benchmark: what counts as growth, and that the peak of the process is really seen."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import memory, results_schema
from benchmarks.process_memory import MemoryMark, use_exact_malloc


def test_the_mark_sees_memory_that_was_freed_again():
    use_exact_malloc()
    mark = MemoryMark(torch.device("cpu"))
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert 63 << 20 <= mark.peak_bytes() < 72 << 20  # the kernel counts pages in batches
    assert MemoryMark(torch.device("cpu")).peak_bytes() < 2 << 20


def test_only_capped_modes_must_not_grow():
    growths = [
        ("padded", 1.0),
        ("padded", 15.0),
        ("chunked", 1.0),
        ("chunked", 1.04),
        ("per_rank", 1.0),
        ("per_rank", 1.06),
        ("pipelined", 0.9),
    ]
    rows = [{"mode": mode, "capped": mode != "padded", "growth": growth} for mode, growth in growths]
    assert memory.grown(rows) == ["per_rank"]


@pytest.mark.mpi
def test_a_table_of_all_cases(world, tmp_path, capsys):
    small = [
        "--tokens",
        "32",
        "--hidden",
        "64",
        "--intermediate",
        "32",
        "--num-experts",
        "8",
        "--modes",
        "broadcast,chunked",
    ]
    options = memory.parse(["--device", "cpu", "--json", str(tmp_path / "memory.json"), *small])
    memory.run(world, options)  # too small for its verdict to mean anything
    out = capsys.readouterr().out
    if world.rank:
        assert not out
        return
    document = json.loads(out.splitlines()[-1])
    results_schema.validate(document)
    assert document == results_schema.read_results(tmp_path / "memory.json")
    assert [(row["mode"], row["tokens_per_rank"]) for row in document["rows"]] == [
        (m, t) for m in ("broadcast", "chunked") for t in (32, 128, 512)
    ]
    workspace = {(row["mode"], row["factor"]): row["workspace_bytes"] for row in document["rows"]}
    assert workspace["chunked", 1] == workspace["chunked", 4] == workspace["chunked", 16]
    assert workspace["broadcast", 16] > 2 * workspace["broadcast", 4] > 2 * workspace["broadcast", 1]


@pytest.mark.parametrize(
    "options, message",
    [(["--modes", "capped"], "choose from padded"), (["--top-k", "40"], "more than --num-experts 32")],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        memory.parse(options)
    assert refused.value.code == 2 and message in capsys.readouterr().err
