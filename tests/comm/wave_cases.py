"""Waves that no planner makes: a rank alone, ranks in odd order, several segments of one, rows in another order."""

from __future__ import annotations

from pipemoe.plan.schedule import Segment, Wave


def broadcast_waves(num_ranks: int) -> dict[str, Wave]:
    """By what is odd about them."""
    last = num_ranks - 1
    waves = {f"rank {root} alone": _one_after_another([(root, 0, 3)]) for root in range(num_ranks)}
    waves["all, from the last to the first"] = _one_after_another(
        [(rank, 5, 6 + rank) for rank in reversed(range(num_ranks))]
    )
    waves["two of each, by turns"] = _one_after_another(
        [(r, at, at + 2 + r) for at in (0, 20) for r in range(num_ranks)]
    )
    waves["three of the last around one of the first"] = _one_after_another(
        [(last, 0, 1), (last, 1, 5), (0, 0, 2), (last, 5, 7)]
    )
    backwards = waves["two of each, by turns"]
    rows = backwards.num_rows
    segments = tuple(s._replace(row=rows - s.row - s.num_rows) for s in backwards.segments)
    waves["two of each, the first ones at the end"] = Wave(segments, rows)
    return waves


def padded_wave(num_ranks: int) -> Wave:
    """A block of 5 rows for each rank: full ones, one of a single row, and from three ranks on, one without."""
    counts = [5 if rank == 0 else 1 if rank == 1 else 0 if rank == 2 else 4 for rank in range(num_ranks)]
    return Wave(tuple(Segment(rank, 7, 7 + n, 5 * rank) for rank, n in enumerate(counts) if n), 5 * num_ranks)


def _one_after_another(pieces: list[tuple[int, int, int]]) -> Wave:
    """pieces: rank, start, stop."""
    segments, row = [], 0
    for rank, start, stop in pieces:
        segments.append(Segment(rank, start, stop, row))
        row += stop - start
    return Wave(tuple(segments), row)
