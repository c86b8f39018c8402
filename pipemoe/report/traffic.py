"""What a report shows of benchmarks/serve: a table, TTFT against the rate with capacities, and distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_CURVES = {"ttft_ms_p95_short": "the short prompts'", "ttft_ms_p95": "all"}  # 95 % of them, against the rate
# Of a line of the table: medians over seeds.
_FIGURES = (
    "rate_rps",
    "ttft_ms_p50",
    "ttft_ms_p95",
    "ttft_ms_p95_short",
    "ttft_ms_p95_long",
    "queueing_ms_p50",
    "tokens_per_s",
    "capacity_rps",
)
Rows = Sequence[Mapping[str, Any]]


def campaigns(rows: Rows) -> list[dict[str, Any]]:
    """One for each trace and arrival process of a serve benchmark's rows. Raises KeyError if a row lacks a field."""
    of: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["what"] == "load":
            of.setdefault((row["trace"], row["arrivals"]), []).append(row)
    return [_campaign(trace, arrivals, found) for (trace, arrivals), found in of.items()]


def _campaign(trace: str, arrivals: str, rows: Rows) -> dict[str, Any]:
    labels = list(dict.fromkeys(row["label"] for row in rows))
    highest = max(row["load"] for row in rows)
    first = rows[0]
    limits = first["limits_ms"] or {}
    facts = f"{first['model']}, {first['layers']} layers, {first['num_ranks']} ranks, {first['requests']} requests"
    if limits:
        facts += "; capacity: the highest rate at which 95 % of every class have their first token in time: "
        facts += ", ".join(f"{name} {ms:.0f} ms" for name, ms in limits.items())
    return {
        "name": f"{trace}, arrivals: {arrivals}",
        "facts": facts,
        "lines": [_line(label, load, rows) for load in _loads(rows) for label in labels if _at(rows, label, load)],
        "rates": [
            {
                "of": of,
                "series": [{"label": label, "points": _points(rows, label, field)} for label in labels],
            }
            for field, of in _CURVES.items()
        ],
        "capacities": {label: _median(rows, label, None, "capacity_rps") for label in labels},
        "load": highest,
        "distributions": [
            {"label": label, "curve": [median(values) for values in zip(*curves)]}
            for label in labels
            if (curves := [row["ttft_curve_ms"] for row in _at(rows, label, highest) if row["ttft_curve_ms"]])
        ],
    }


def _loads(rows: Rows) -> list[float]:
    return sorted({row["load"] for row in rows})


def _at(rows: Rows, label: str, load: float | None) -> Rows:
    """A policy's rows, of all seeds; at any load if that is None."""
    return [row for row in rows if row["label"] == label and load in (None, row["load"])]


def _median(rows: Rows, label: str, load: float | None, field: str) -> float | None:
    known = [row[field] for row in _at(rows, label, load) if row[field] is not None]
    return median(known) if known else None


def _line(label: str, load: float, rows: Rows) -> dict[str, Any]:
    return {"label": label, "load": load} | {field: _median(rows, label, load, field) for field in _FIGURES}


def _points(rows: Rows, label: str, field: str) -> list[list[float]]:
    found = [(_median(rows, label, load, "rate_rps"), _median(rows, label, load, field)) for load in _loads(rows)]
    return [[rate, ms] for rate, ms in found if rate is not None and ms is not None]
