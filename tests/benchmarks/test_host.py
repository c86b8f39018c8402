"""The host path in turns with an older build: what becomes of the times."""

from types import SimpleNamespace

import pytest

from benchmarks import results_schema
from benchmarks.host import __main__ as host


def test_times_of_repeats_become_medians_per_prompt():
    repeats = [[[1.0], [], [4.0, 7.0]], [[3.0], [], [5.0, 9.0]], [[2.0], [], [6.0, 8.0]]]  # [repeat][rank][prompt]
    assert host._medians(repeats) == [2.0, 5.0, 8.0]


def test_rows_have_medians_over_rounds_and_what_the_ranks_say(capsys):
    options = host.parse(["--ranks", "2", "--rank-tokens", "3,5", "--num-requests", "0", "--rounds", "3"])
    (workload,) = host.workloads_of(options)
    asked = []

    def run(mode, steps):
        asked.append((mode, steps))
        seconds = 0.001 * len(asked)
        return [[[seconds], [3 * seconds]] for _ in steps]

    facts = [{mode: {"workspace_bytes": 10 + rank} for mode in options.modes} | {"init_bytes": 7} for rank in range(2)]
    build = SimpleNamespace(name="now", facts=facts, run=run)
    options.modes = ["auto"]
    (row,) = host.measure([build], [workload], options)
    assert [mode for mode, _ in asked] == ["auto"] * 3 and all(len(steps) == 4 for _, steps in asked)
    assert row["ttft_ms"] == [2.0, 6.0] and row["mean_ttft_ms"] == 4.0 and row["input_lens"] == [3, 5]
    assert row["workspace_bytes"] == 11 and row["init_bytes"] == 7
    results_schema.validate(results_schema.results_document("host", [row]))
    assert "auto" in capsys.readouterr().out


def _build_whose_launcher(does, folder):
    """A tree whose launch/mpirun.sh is `does`, a Python program that takes its arguments."""
    launcher = folder / "launch" / "mpirun.sh"
    launcher.parent.mkdir()
    launcher.write_text(f"#!/usr/bin/env python3\n{does}")
    launcher.chmod(0o755)
    return folder


_ONE_RANK = """
import json, sys
folder = sys.argv[4]
with open(folder + "/commands.0") as commands, open(folder + "/results.0", "w") as results:
    print(json.dumps({"facts": 1}), file=results, flush=True)
    for line in commands:
        print(json.dumps([[len(step[0])] for step in json.loads(line)["steps"]] * 40_000), file=results, flush=True)
"""


def test_a_build_answers_and_ends_when_it_is_told_to(tmp_path):
    options = host.parse(["--ranks", "1"])
    with host.started("old", _build_whose_launcher(_ONE_RANK, tmp_path), options, 8) as build:
        assert build.facts == [{"facts": 1}]
        assert build.run("auto", [[[3, 4]]]) == [[[2]]]  # of an answer longer than a pipe holds


@pytest.mark.parametrize(
    "does", ["raise SystemExit(3)", _ONE_RANK.replace("for line", "raise SystemExit(3)\n    for line")]
)
def test_ranks_that_end_too_early_end_the_benchmark(does, tmp_path):
    """Whether they have opened their pipes or not."""
    options = host.parse(["--ranks", "1"])
    with (
        pytest.raises(SystemExit, match="'old' have ended, with status 3"),
        host.started("old", _build_whose_launcher(does, tmp_path), options, 8) as build,
    ):
        build.run("auto", [[[1]]])
