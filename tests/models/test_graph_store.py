"""Room for keys and values, and which graphs it leaves."""

from types import SimpleNamespace

import pytest
import torch

from pipemoe import Config
from pipemoe.models import graph_store
from pipemoe.models.graph_store import GraphStore
from pipemoe.models.step_keys import StepKeys

CONFIG = Config(max_tokens_per_rank=64)
OTHER = Config(max_tokens_per_rank=32)


@pytest.fixture
def store(monkeypatch):
    """Of a decoder whose keys have places; graphs are stand-ins."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(graph_store, "AttendGraphs", lambda decoder, dtype, rows, keys: SimpleNamespace(keys=keys))
    decoder = SimpleNamespace(
        device=torch.device("cpu"),
        dtype=torch.float32,
        config=SimpleNamespace(num_hidden_layers=2),
        key_sizes=lambda: [(1, 4), (1, 4)],
        keys_in_places=True,
        can_be_captured=True,
    )
    return GraphStore(decoder)


def graphs(store, config):
    return store.graphs(config, 0, torch.float32)


def capture(store, config):
    store.prepare(config)
    store.capture(config, 0, torch.float32)
    assert graphs(store, config).keys is store.keys(config)


def test_graphs_know_the_keys_that_are_there(store):
    for config in (CONFIG, OTHER):
        capture(store, config)
    assert store.keep(CONFIG, 64, 64) is store.keys(CONFIG) and graphs(store, CONFIG)  # there is room for so many
    kept = store.keep(CONFIG, 200, 100)
    assert (len(kept), kept.longest) == (201, 100) and kept is store.keys(CONFIG)
    assert graphs(store, CONFIG) is None and graphs(store, OTHER)
    capture(store, CONFIG)
    kept = store.keep(CONFIG, 100, 150)
    assert (len(kept), kept.longest) == (201, 150)


@pytest.mark.parametrize("fails_at", ["keys", "capture"])
def test_room_that_was_kept_in_vain_is_given_back(store, monkeypatch, fails_at):
    def refuse(*args, **kwargs):
        raise torch.OutOfMemoryError("planted")

    for config in (CONFIG, OTHER):
        capture(store, config)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(graph_store, {"keys": "StepKeys", "capture": "AttendGraphs"}[fails_at], refuse)
        store.keep(CONFIG, 200, 100)
        store.capture(CONFIG, 0, torch.float32)
    store.forget(CONFIG)
    assert (len(store.keys(CONFIG)), store.keys(CONFIG).longest) == (65, 64)
    assert graphs(store, CONFIG) is None and graphs(store, OTHER)
    capture(store, CONFIG)


def test_memory_of_earlier_keys_is_free_before_there_are_new_ones(store, monkeypatch):
    alive = 0

    class Counted(StepKeys):
        def __init__(self, *args, **kwargs):
            nonlocal alive
            assert not alive
            alive += 1
            super().__init__(*args, **kwargs)

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(graph_store, "StepKeys", Counted)
    capture(store, CONFIG)
    assert store.keep(CONFIG, 200, 100)
    store.forget(CONFIG)
    assert alive == 1


def test_nothing_is_kept_where_keys_have_no_places(store):
    store._decoder.keys_in_places = store._decoder.can_be_captured = False
    assert store.keep(CONFIG, 200, 100) is None
    store.forget(CONFIG)
    assert store.keys(CONFIG) is None
