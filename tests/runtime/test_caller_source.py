"""The caller's source, without a step: what a layer's call gives is there for the conductor, until it is forgotten."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe.errors import InputError
from pipemoe.runtime.caller_source import CallerSource

RANK = 1


@pytest.fixture
def source():
    """Of two layers; rank 1 has a segment in two of three waves. Counts what wakes the conductor."""
    wakes = []
    made = CallerSource(2, lambda: wakes.append(None), lambda: None)
    made.wakes = wakes
    waves = [SimpleNamespace(segments=[SimpleNamespace(rank=rank) for rank in ranks]) for ranks in ([0, 1], [0], [1])]
    assert not made.begun.is_set()
    made.begin(SimpleNamespace(cohorts=[SimpleNamespace(waves=waves)], facts=SimpleNamespace(lengths=((1,),))), RANK)
    assert made.begun.is_set()
    return made


def give(source, layer):
    x, sums = torch.arange(12.0).view(6, 2) + layer, torch.zeros(6, 2)
    ids, weights = torch.arange(6, dtype=torch.int32).view(6, 1), torch.rand(6, 1)
    source.give(layer, x, ids, weights, sums)
    return x, ids, weights, sums


def test_a_layer_is_ready_once_it_is_given(source):
    assert not source.ready(0, 0)
    give(source, 0)
    assert source.ready(0, 0) and not source.ready(0, 1) and len(source.wakes) == 1


def test_each_cohort_reads_and_writes_the_layer_that_it_attends_to(source):
    first, second = give(source, 0), give(source, 1)
    source.attend(0, 1)
    source.attend(1, 0)
    for cohort, (x, ids, weights, sums) in ((0, second), (1, first)):
        for found, wanted in zip(source.rows(cohort, 2, 5), (x, ids, weights), strict=True):
            assert torch.equal(found, wanted[2:5])
        source.results(cohort, 2, 5).fill_(3)
        assert sums.sum(1).tolist() == [0, 0, 6, 6, 6, 0]


def test_a_layer_is_issued_when_all_of_this_ranks_combines_are(source):
    source.combined(0, 0, "first")
    assert not source.issued[0].is_set()
    source.combined(0, 0, "second")
    assert source.issued[0].is_set() and not source.issued[1].is_set() and source.events[0] == ["first", "second"]


def test_forgetting_lets_go_of_tensors_and_events(source):
    give(source, 0)
    give(source, 1)
    source.combined(0, 0, "event")
    source.forget(0)
    assert not source.ready(0, 0) and source.ready(0, 1) and source.events == [[], []]
    source.forget_all()
    assert not source.ready(0, 1)


def test_an_abandoned_step_goes_on_and_raises_where_rows_are_missing(source):
    give(source, 0)
    error = InputError("left")
    source.abandon(error)
    assert source.ready(0, 1) and len(source.wakes) == 2
    source.attend(0, 0)
    with pytest.raises(InputError, match="left"):
        source.attend(0, 1)
