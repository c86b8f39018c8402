"""The model's source, over a decoder that records: the pieces that a cohort attends to, its rows, its tokens."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe.models import microbatch
from pipemoe.models.packing import Piece
from pipemoe.models.source import ModelSource

RANK, WIDTH = 1, 2
TOKENS = [torch.arange(10, 14), torch.arange(20, 25), torch.arange(30, 32)]  # sequences of 4, 5 and 2 tokens


class Microbatch:
    """Row i holds i; the logits of an end are one-hot at its sequence's number, or NaN."""

    def __init__(self, ids, pieces, nan):
        self.ids, self.pieces, self.nan = ids, pieces, nan
        self.sums, self.shared_runs = torch.zeros(len(ids), WIDTH), 0

    def attend(self, layer, rows=None):
        rows = torch.arange(len(self.ids))
        return rows + 100 * layer, rows.int(), rows.float()

    def run_shared(self):
        self.shared_runs += 1

    def finish(self):
        ends = [p.sequence for p in self.pieces if p.stop == p.length]
        logits = torch.eye(8)[ends]
        return torch.where(torch.tensor([[n in self.nan] for n in ends]), torch.nan, logits) if ends else logits


class Chunk:
    """As a plan's microbatch, in order of tokens."""

    def __init__(self, rank, start, stop):
        self.rank, self.start, self.stop = rank, start, stop

    def __lt__(self, other):
        return (self.rank, self.start) < (other.rank, other.start)


@pytest.fixture
def made(monkeypatch):
    """A source that has begun a plan of two cohorts, and its microbatches by cohort's slot."""
    started = {}

    def start(decoder, graphs, step, ids, pieces, results_dtype):
        started[graphs] = Microbatch(ids, pieces, nan={2})
        return started[graphs]

    monkeypatch.setattr(microbatch, "start_microbatch", start)
    decoder = SimpleNamespace(has_shared_experts=True)
    source = ModelSource(decoder, ["slot 0", "slot 1"], lambda bounds: None, TOKENS, torch.float32, keep_logits=True)
    cohorts = [
        SimpleNamespace(slot=1, microbatches=[Chunk(1, 6, 8), Chunk(0, 0, 9), Chunk(1, 0, 2)]),
        SimpleNamespace(slot=0, microbatches=[Chunk(1, 2, 5), Chunk(1, 5, 6), Chunk(1, 8, 11)]),
    ]
    source.begin(SimpleNamespace(facts=SimpleNamespace(boundaries=[(0, 9), (0, 4, 9, 11)]), cohorts=cohorts), RANK)
    source.attend(0, 0)
    source.attend(1, 0)
    return source, started


def test_a_cohort_attends_to_its_pieces_of_each_sequence(made):
    _, started = made
    assert started["slot 1"].pieces == [Piece(0, 0, 2, 4), Piece(1, 2, 4, 5)]
    assert started["slot 1"].ids.tolist() == [10, 11, 22, 23]
    assert started["slot 0"].pieces == [Piece(0, 2, 4, 4), Piece(1, 0, 2, 5), Piece(1, 4, 5, 5), Piece(2, 0, 2, 2)]
    assert started["slot 0"].ids.tolist() == [12, 13, 20, 21, 24, 30, 31]


def test_rows_and_results_are_those_of_the_tokens(made):
    source, started = made
    hidden, ids, weights = source.rows(0, 6, 8)
    assert hidden.tolist() == [2, 3] and ids.tolist() == [2, 3] and weights.tolist() == [2, 3]
    assert source.rows(1, 9, 11)[0].tolist() == [5, 6]
    source.attend(1, 1)
    assert source.rows(1, 4, 6)[0].tolist() == [102, 103]
    source.results(1, 8, 10).fill_(7)
    assert started["slot 0"].sums[:, 0].tolist() == [0, 0, 0, 0, 7, 7, 0]
    source.side_work(1)
    assert started["slot 0"].shared_runs == 1 and started["slot 1"].shared_runs == 0


def test_first_tokens_come_from_the_cohort_that_ends_a_sequence(made):
    source, _ = made
    source.finish(1)
    source.finished(1, 5.0)
    found = source.prefilled(2.0)
    assert found.first_tokens[:2] == [0, 1] and found.finite == [True, True, False]
    assert found.ttft_seconds == [3.0, 3.0, 3.0] and found.logits.shape == (3, 8)
