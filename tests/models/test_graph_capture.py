"""collection_held: garbage waits until after a capture."""

from __future__ import annotations

import gc
import weakref

import pytest

from pipemoe.models.graph_capture import collection_held


class Node:
    def __init__(self):
        self.itself = self


def test_cycles_are_not_collected_inside():
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        with collection_held():
            alive = weakref.ref(Node())
            for _ in range(1000):
                Node()
            assert alive() is not None
        for _ in range(1000):
            Node()
        assert alive() is None
    finally:
        gc.set_threshold(*threshold)


def test_what_was_off_stays_off_and_errors_turn_it_on_again():
    with pytest.raises(ValueError):
        with collection_held():
            raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with collection_held():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
