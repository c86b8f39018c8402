"""What `pipemoe plan` prints: candidates, predicted times, a timeline in letters; or all but that as plain data. No
decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipemoe.plan.auto.choice import Candidate
from pipemoe.plan.clock.prediction import Prediction
from pipemoe.plan.schedule import OpKind, Plan

_LETTERS = {OpKind.ATTEND: "a", OpKind.EXPERTS: "E", OpKind.FINISH: "f", OpKind.DISPATCH: ">", OpKind.COMBINE: "<"}
_LANES = (("compute", (OpKind.ATTEND, OpKind.EXPERTS, OpKind.FINISH)), ("exchange", (OpKind.DISPATCH, OpKind.COMBINE)))


def milliseconds(nanoseconds: int | float | None) -> str:
    return "-" if nanoseconds is None else f"{nanoseconds / 1e6:.2f}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Aligned columns, all but the first to the right. The first line is the heading."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    )


def candidates_table(candidates: Sequence[Candidate]) -> str:
    lines = [["candidate", "cohorts", "SMs left", "mean ms", "p50 ms", "slowest ms", ""]]
    for c in candidates:
        counts, times = (len(c.assignment), c.sms_left), (c.mean, c.p50, c.slowest)
        lines.append([c.name, *map(str, counts), *map(milliseconds, times), "<- chosen" if c.chosen else ""])
    return table(lines)


def front_table(front: Sequence[tuple[int, Candidate]]) -> str:
    """front: the candidate chosen with each makespan budget, in percent."""
    lines = [["makespan budget", "mean ms", "slowest ms", "candidate"]]
    lines += [[f"{percent} %", milliseconds(c.mean), milliseconds(c.slowest), c.name] for percent, c in front]
    return table(lines)


def as_json(
    plan: Plan, prediction: Prediction, candidates: Sequence[Candidate], front: Sequence[tuple[int, Candidate]]
) -> dict[str, Any]:
    """The same as plain data for `json.dumps`; times in ms, None for a rank without tokens."""

    def ms(nanoseconds: int | float | None) -> float | None:
        return None if nanoseconds is None else nanoseconds / 1e6

    def figures(c: Candidate) -> dict[str, Any]:
        return {"name": c.name, "mean_ttft_ms": ms(c.mean), "slowest_ttft_ms": ms(c.slowest)}

    def form(c: Candidate) -> dict[str, Any]:
        counts = {"cohorts": len(c.assignment), "sms_left": c.sms_left}
        return figures(c) | {"p50_ttft_ms": ms(c.p50), "chosen": c.chosen} | counts

    return {
        "num_ranks": plan.facts.num_ranks,
        "moe_layers": plan.shape.num_layers,
        "mean_ttft_ms": ms(prediction.mean),
        "slowest_ttft_ms": ms(prediction.makespan),
        "ranks": [
            {"tokens": tokens, "ttft_ms": ms(ttft), "exposed_comm_ms": ms(exposed)}
            for tokens, ttft, exposed in zip(plan.facts.tokens, prediction.ttft, prediction.exposed)
        ],
        "cohorts": [
            {
                "rows": sum(wave.num_rows for wave in cohort.waves),
                "waves": len(cohort.waves),
                "chunks": [{"rank": m.rank, "start": m.start, "stop": m.stop} for m in cohort.microbatches],
            }
            for cohort in plan.cohorts
        ],
        "candidates": [form(c) for c in candidates],
        "front": [{"makespan_budget_percent": percent} | figures(c) for percent, c in front],
    }


def ranks_table(plan: Plan, prediction: Prediction) -> str:
    lines = [["rank", "tokens", "TTFT ms", "exposed comm ms"]]
    for rank, tokens in enumerate(plan.facts.tokens):
        lines.append(
            [str(rank), str(tokens), milliseconds(prediction.ttft[rank]), milliseconds(prediction.exposed[rank])]
        )
    return table(lines)


def cohorts_lines(plan: Plan) -> str:
    """One line per cohort, then what holds for the plan: multiprocessors left."""
    lines = []
    for c, cohort in enumerate(plan.cohorts):
        parts = [f"{m.rank}[{m.start}:{m.stop}]" for m in cohort.microbatches]
        rows = sum(wave.num_rows for wave in cohort.waves)
        count = len(cohort.waves)
        lines.append(
            f"cohort {c}: {rows} rows in {count} wave{'s' if count > 1 else ''}, rank[tokens] {' '.join(parts)}"
        )
    if plan.sms_left:
        lines.append(f"experts leave {plan.sms_left} multiprocessors to collectives")
    return "\n".join(lines)


def timeline_ranks(plan: Plan) -> list[int]:
    """The ranks that `timeline_text` shows: one with the most and one with the fewest tokens."""
    chosen: dict[int, int] = {}
    for rank, tokens in enumerate(plan.facts.tokens):
        chosen.setdefault(tokens, rank)
    return sorted({chosen[max(chosen)], chosen[min(chosen)]})


def timeline_text(plan: Plan, prediction: Prediction, *, num_layers: int, width: int) -> str:
    """The first layers on the ranks of `timeline_ranks`, a letter per piece of time.

    prediction: with those ranks' spans. Per rank and cohort: a attend, E experts, f finish; > dispatch, < combine.
    """
    layers = range(min(num_layers, plan.shape.num_layers))
    ranks = timeline_ranks(plan)
    spans = {rank: [s for s in prediction.spans[rank] if s[0].layer in layers and s[1][0] < s[1][1]] for rank in ranks}
    end = max((stop for of_rank in spans.values() for _, (_, stop) in of_rank), default=1)
    lines = [
        f"first {len(layers)} layers, {milliseconds(end)} ms; a attend, E experts, f finish, > dispatch, < combine"
    ]
    for rank in ranks:
        for c in range(len(plan.cohorts)):
            for name, kinds in _LANES:
                row = [" "] * width
                for op, (begin, stop) in spans[rank]:
                    if op.cohort == c and op.kind in kinds:
                        first = min(begin * width // end, width - 1)
                        row[first : max(stop * width // end, first + 1)] = _LETTERS[op.kind] * max(
                            stop * width // end - first, 1
                        )
                lines.append(f"rank {rank} cohort {c} {name:8} |{''.join(row)}|")
    return "\n".join(lines)
