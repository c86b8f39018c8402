"""benchmarks/attention.py as far as it goes without a GPU."""

import pytest
import torch

from benchmarks import attention, results_schema
from benchmarks.attention import Case
from pipemoe.errors import ConfigError


def test_pairs_against_counting():
    for queries, keys, window in [((5, 1), (5, 9), None), ((4,), (10,), 3), ((7,), (7,), 2), ((3,), (3,), 100)]:
        counted = 0
        for n, m in zip(queries, keys, strict=True):
            for row in range(n):
                last = m - n + row
                counted += sum(window is None or last - column < window for column in range(last + 1))
        assert Case("", queries, keys, window).pairs == counted


def test_cases_are_what_their_names_say():
    for name in attention.SHAPES:
        cases = attention.cases_of(name)
        assert len({case.name for case in cases}) == len(cases)
        assert all(len(case.queries) == len(case.keys) for case in cases)
        assert all(n <= m for case in cases for n, m in zip(case.queries, case.keys, strict=True))
        assert {case.name for case in cases if case.is_one_whole} == {
            case.name for case in cases if case.name.isdigit()
        }


def test_largest_excess():
    """Times that grow with the length are no excess; one call that stalls is, wherever it is in the order."""
    lengths = range(10, 2010, 50)
    times = {length: length / 1000 for length in reversed(lengths)}
    assert attention.largest_excess(times) < 0.3
    for stalled in (10, 1010, 1960):
        assert attention.largest_excess(times | {stalled: 45 + stalled / 1000}) == pytest.approx(45, abs=0.3)


def test_rows_have_the_schema():
    fields = results_schema.ROW_FIELDS["attention"]
    row = {name: {str: "x", int: 1}.get(types[0], 0.5) for name, types in fields.items()}
    results_schema.validate(results_schema.results_document("attention", [row]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu():
    with pytest.raises(ConfigError, match="no"):
        attention.run(attention.parse([]))


def test_wrong_shapes_are_refused(capsys):
    with pytest.raises(SystemExit):
        attention.parse(["--shapes", "gpt-2"])
    assert "gpt-2" in capsys.readouterr().err
