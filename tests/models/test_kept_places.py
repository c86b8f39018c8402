"""Rows for keys and values: never two sequences in one, and all of them free again."""

from hypothesis import given
from hypothesis import strategies as st

from pipemoe.models.kept_places import KeptPlaces

NUM_ROWS = 40


@given(st.integers(0, 9), st.lists(st.one_of(st.integers(1, 15), st.integers(-8, -1)), max_size=60))
def test_pieces_are_whole_and_apart(first, steps):
    """Steps: take so many rows, or give back one of the pieces. First fit, against a naive map of rows."""
    places, rows, taken = KeptPlaces(first, NUM_ROWS), [False] * NUM_ROWS, []
    for step in steps:
        if step > 0:
            fits = [i for i in range(NUM_ROWS - step + 1) if not any(rows[i : i + step])]
            start = places.take(step)
            assert start == (first + fits[0] if fits else None)
            if start is not None:
                rows[start - first : start - first + step] = [True] * step
                taken.append((start, step))
        elif taken:
            start, length = taken.pop(step % len(taken))
            places.give_back(start, length)
            rows[start - first : start - first + length] = [False] * length
        assert places.num_free == rows.count(False)
    for start, length in taken:
        places.give_back(start, length)
    assert places.take(NUM_ROWS) == first
