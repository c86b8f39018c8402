"""The numbers that a small step's graph reads, and which steps have a graph."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.model import Model
from pipemoe.models import whole_graphs
from pipemoe.models.source import ModelSource
from pipemoe.models.whole_graphs import MAX_SEQUENCES, ROWS, WholeGraphs

PADDING_ROW = 77


def words_of(num_rows):
    """As a graph has them after another step."""
    sizes = {"place": 2, "ids": num_rows, "positions": num_rows, "key_rows": num_rows, "ends": MAX_SEQUENCES}
    halves = {"offsets": MAX_SEQUENCES + 1, "lengths": MAX_SEQUENCES}
    words = {name: np.full(size, 99, np.int64) for name, size in sizes.items()}
    return words | {name: np.full(size, 99, np.int32) for name, size in halves.items()}


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=MAX_SEQUENCES), padding=st.integers(0, 5))
def test_the_numbers_of_a_step(lengths, padding):
    count, words = sum(lengths), words_of(sum(lengths) + padding)
    tokens = [torch.randint(0, 1000, (n,)) for n in lengths]
    whole_graphs._fill(words, tokens, 4096, PADDING_ROW)
    assert words["place"].tolist() == [4096, count]
    assert words["ids"].tolist() == torch.cat(tokens).tolist() + [0] * padding
    assert words["positions"].tolist() == [p for n in lengths for p in range(n)] + [0] * padding
    assert words["key_rows"].tolist() == [*range(count)] + [PADDING_ROW] * padding
    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    left = MAX_SEQUENCES - len(lengths)
    assert words["offsets"].tolist() == begins + [count] * (left + 1)  # pieces without tokens behind the last
    assert words["lengths"].tolist() == lengths + [0] * left
    assert words["ends"][: len(lengths)].tolist() == [b + n - 1 for b, n in zip(begins, lengths)]


def test_a_graph_that_is_only_uploaded_has_no_rows():
    words = words_of(4)
    whole_graphs._fill(words, [torch.zeros(4, dtype=torch.long)], 0, PADDING_ROW)
    assert words["place"].tolist() == [0, 0]


def test_rows_go_up():
    assert len(set(ROWS)) == len(ROWS) and max(ROWS) == whole_graphs.MOST_ROWS


class Graphs:
    """Serves up to three tokens."""

    def serves(self, tokens):
        return sum(map(len, tokens)) <= 3

    def run(self, tokens):
        return torch.tensor([[0.0, 2.0, 1.0], [torch.inf, 0.0, 0.0]])[: len(tokens)]


@pytest.mark.parametrize(
    "lengths, serves",
    [([], False), ([20], True), ([21], False), ([1] * MAX_SEQUENCES, True), ([1] * (MAX_SEQUENCES + 1), False)],
)
def test_as_many_rows_and_sequences_as_numbers_have_room_for(lengths, serves):
    graphs = WholeGraphs.__new__(WholeGraphs)  # without a GPU none is made
    graphs.most_rows = 20
    assert graphs.serves([torch.zeros(length) for length in lengths]) == serves


@pytest.mark.parametrize("slot, count, serves", [(0, 3, True), (0, 4, False), (1, 3, False)])
def test_a_source_offers_them(slot, count, serves):
    tokens = [torch.zeros(1), torch.zeros(count - 1)]
    decoder = SimpleNamespace(has_shared_experts=False)
    source = ModelSource(decoder, [], lambda bounds: None, tokens, torch.float32, keep_logits=True, whole=Graphs())
    work = source.whole(SimpleNamespace(cohorts=[SimpleNamespace(slot=slot)]))
    assert (work is not None) == serves
    if work is not None:
        work()
        source.finished(0, 5.0)
        found = source.prefilled(begin=3.5)
        assert (found.first_tokens, found.finite, found.ttft_seconds) == ([1, 0], [True, False], [1.5, 1.5])
        assert found.logits.shape == (2, 3)


def test_a_source_without_graphs():
    decoder = SimpleNamespace(has_shared_experts=False)
    source = ModelSource(decoder, [], lambda bounds: None, [torch.zeros(1)], torch.float32, keep_logits=False)
    assert source.whole(SimpleNamespace(cohorts=[SimpleNamespace(slot=0)])) is None


class Decoder:
    """Notes what it is asked for. Keys are of no interest."""

    device, dtype, vocab_size = torch.device("cpu"), torch.float32, 1000
    shape = SimpleNamespace(num_layers=2, hidden=4)

    def __init__(self):
        self.log = []

    def embed(self, ids):
        return ids.unsqueeze(0).float()

    def attend(self, state, layer, sums, placed):
        assert (state.hidden.shape[1], state.rope[0].shape[:2]) == (len(state.cache.rows), (1, len(state.cache.rows)))
        self.log.append(("attend", layer, sums is not None))

    def run_shared(self, state):
        self.log.append("shared")


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    return lambda num_rows: whole_graphs._WholeGraph(Decoder(), None, num_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_what_attention_is_told(whole, num_rows):
    """Bounds that hold for all steps; of one query in each piece the flash kernel would make other shapes."""
    packing = whole(num_rows).state.packing
    assert packing.max_query >= max(2, num_rows) and packing.max_key >= num_rows and packing.starts_fresh
    assert (len(packing.query_offsets), len(packing.key_lengths)) == (MAX_SEQUENCES + 1, MAX_SEQUENCES)
    assert packing.query_offsets.dtype == packing.key_offsets.dtype == packing.key_lengths.dtype == torch.int32


def test_layers_in_their_order(whole):
    pytest.importorskip("numba_cuda")
    graph = whole(3)
    whole_graphs._fill(graph.words.of_host, [torch.tensor([5, 6])], 16, PADDING_ROW)
    graph.words.send()
    rows, sums = SimpleNamespace(ids=torch.zeros(3, 2, dtype=torch.int32), stride=32), torch.zeros(3, 4)
    log = graph._decoder.log
    table = torch.arange(10.0).unsqueeze(1)
    graph.enqueue((table, table), rows, sums, lambda layer, r, s: log.append(("experts", layer, s is sums)))
    assert bool((rows.ids == -1).all()) and graph.state.hidden.tolist() == [[5, 6, 0]]
    assert graph.state.rope[0].flatten().tolist() == [0, 1, 0]
    assert log == [
        *(("attend", 0, False), "shared", ("experts", 0, True)),
        *(("attend", 1, True), "shared", ("experts", 1, True)),
    ]


@pytest.mark.parametrize("error", [RuntimeError("shape '[16, 2]' is invalid"), AssertionError(), None])
def test_what_cannot_be_captured_runs_as_ever(monkeypatch, caplog, error):
    def made(*arguments):
        if error is not None:
            raise error
        return "graphs"

    monkeypatch.setattr(whole_graphs, "serves", lambda decoder: True)
    monkeypatch.setattr(whole_graphs, "WholeGraphs", made)
    store = SimpleNamespace(keys=lambda config: "keys", most_rows=lambda config: 64)
    model = SimpleNamespace(_graphs=store, config=None, decoder=SimpleNamespace(dtype=torch.bfloat16), _whole=None)
    with caplog.at_level(logging.WARNING, "pipemoe"):
        Model._capture_whole(model, 0, torch.bfloat16, SimpleNamespace(wire_dtype=torch.bfloat16), None)
    assert model._whole == (None if error else "graphs") and len(caplog.records) == (error is not None)


def test_a_lack_of_memory_is_an_error(monkeypatch):
    def made(*arguments):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(whole_graphs, "serves", lambda decoder: True)
    monkeypatch.setattr(whole_graphs, "WholeGraphs", made)
    store = SimpleNamespace(keys=lambda config: "keys", most_rows=lambda config: 64)
    model = SimpleNamespace(_graphs=store, config=None, decoder=SimpleNamespace(dtype=torch.bfloat16), _whole=None)
    with pytest.raises(torch.OutOfMemoryError):
        Model._capture_whole(model, 0, torch.bfloat16, SimpleNamespace(wire_dtype=torch.bfloat16), None)
