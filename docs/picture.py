"""Pictures of the docs: one step in several modes, drawn from timelines that benchmarks/ttft has measured, or that
`pipemoe plan --trace` has predicted.

    python docs/picture.py --tokens 4096,16,16,16 --out docs/step.svg \\
        "Lockstep=out/ttft/timeline_4096_16_16_16_padded.json" "pipemoe=out/ttft/timeline_4096_16_16_16_auto.json"

Ranks are rows, time runs to the right. A bar is computation, in the colour of its cohort; the thin line below it is
communication. A diamond is the first token of a rank's prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

_LEFT, _WIDTH, _RIGHT = 150, 760, 40
_ROW, _BAR, _GAP = 30, 14, 34  # heights of a rank's row, of its bar, and of the space between panels
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1c2430 } .dim { fill: #5c6675; font-size: 12px }
  .title { font-weight: 600; font-size: 14px } .axis { stroke: #c9d0d8 } .first { fill: #1c2430 }
  .c0 { fill: #e07b39 } .c1 { fill: #3b7dd8 } .c2 { fill: #2f9e6e } .c3 { fill: #8a63c9 } .all { fill: #7c8797 }
  .moves { opacity: .55 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e8ee } .dim { fill: #97a1b0 } .axis { stroke: #3a434f } .first { fill: #e4e8ee }
    .c0 { fill: #f0a069 } .c1 { fill: #6ea5ee } .c2 { fill: #5cc598 } .c3 { fill: #ad8ee2 } .all { fill: #8d98a8 }
  }"""


def picture(panels: Sequence[tuple[str, Mapping[str, Any]]], tokens: Sequence[int]) -> str:
    """The SVG. panels: title and Chrome trace (pipemoe.trace.chrome_trace), one above the other; tokens: per rank."""
    spans = [[e for e in trace["traceEvents"] if e["ph"] == "X"] for _, trace in panels]
    end = max(e["ts"] + e["dur"] for of_panel in spans for e in of_panel)
    scale = _WIDTH / end
    height = _GAP * len(panels) + _ROW * len(tokens) * len(panels) + 58
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + _RIGHT} {height}" role="img">',
        f"<style>{_STYLE}\n</style>",
    ]
    top = 0
    for (title, _), of_panel in zip(panels, spans):
        lines.append(f'<text class="title" x="2" y="{top + 20}">{escape(title)}</text>')
        top += _GAP
        several = len({e["args"]["cohort"] for e in of_panel}) > 1
        for rank, count in enumerate(tokens):
            lines.append(f'<text class="dim" x="2" y="{top + 13}">rank {rank}, {count} tokens</text>')
            lines += _of_rank([e for e in of_panel if e["pid"] == rank], scale, top, several, count > 0)
            top += _ROW
    lines += _axis(end, scale, top + 4)
    return "\n".join([*lines, "</svg>\n"])


def _of_rank(
    spans: Sequence[Mapping[str, Any]], scale: float, top: float, several: bool, has_tokens: bool
) -> list[str]:
    lines = []
    for cohort in sorted({e["args"]["cohort"] for e in spans}):
        colour = f"c{cohort % 4}" if several else "all"
        for computes in (True, False):
            mine = [e for e in spans if e["args"]["cohort"] == cohort and (e["cat"] == "compute") == computes]
            y, height = (top, _BAR) if computes else (top + _BAR + 2, 3)
            path = ""
            for begin, stop in _joined(mine, 0.4 / scale):
                x, width = _LEFT + begin * scale, max((stop - begin) * scale, 0.3)
                path += f"M{x:.1f} {y}h{width:.1f}v{height}h-{width:.1f}z"
            lines.append(f'<path class="{colour}{"" if computes else " moves"}" d="{path}"/>')
    own = _own_cohorts(spans)
    finishes = [e for e in spans if e["name"] == "finish" and e["args"]["cohort"] in own]
    if finishes and has_tokens:
        x = _LEFT + max(e["ts"] + e["dur"] for e in finishes) * scale + 8
        lines.append(f'<path class="first" d="M{x:.1f} {top + 1}l6 6l-6 6l-6 -6z"/>')
    return lines


def _own_cohorts(spans: Sequence[Mapping[str, Any]]) -> set[int]:
    """The cohorts that hold tokens of this rank: in the others its attention takes no time worth mentioning."""
    attention: dict[int, list[float]] = {}
    for e in spans:
        if e["name"] == "attend":
            attention.setdefault(e["args"]["cohort"], []).append(e["dur"])
    medians = {cohort: median(durations) for cohort, durations in attention.items()}
    return {cohort for cohort, typical in medians.items() if typical > 0.1 * max(medians.values())}


def _joined(spans: Sequence[Mapping[str, Any]], gap: float) -> list[tuple[float, float]]:
    """Intervals of the spans; what lies nearer than `gap` becomes one, as nobody could see between."""
    found: list[tuple[float, float]] = []
    for e in sorted(spans, key=lambda e: e["ts"]):
        begin, stop = e["ts"], e["ts"] + e["dur"]
        if found and begin - found[-1][1] < gap:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((begin, stop))
    return found


def _axis(end: float, scale: float, top: float) -> list[str]:
    step = next(s for s in (1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6, 1e9) if end / s <= 9)
    lines = [f'<path class="axis" d="M{_LEFT} {top}h{_WIDTH}"/>']
    for tick in range(int(end / step) + 1):
        x = _LEFT + tick * step * scale
        lines.append(f'<path class="axis" d="M{x:.1f} {top}v5"/>')
        lines.append(
            f'<text class="dim" text-anchor="middle" x="{x:.1f}" y="{top + 20}">{tick * step / 1e3:g} ms</text>'
        )
    legend = (
        "bars: computing, in the colour of the cohort; thin lines below: exchanging, or waiting for it; ◆ first token"
    )
    lines.append(f'<text class="dim" x="{_LEFT}" y="{top + 44}">{legend}</text>')
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("panels", nargs="+", metavar="TITLE=FILE", help="Chrome traces, one below the other")
    parser.add_argument("--tokens", required=True, metavar="T,T,...", help="of the step, per rank")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    tokens = [int(word) for word in options.tokens.split(",")]
    panels = []
    for panel in options.panels:
        title, _, file = panel.partition("=")
        panels.append((title, json.loads(Path(file).read_text())))
    options.out.write_text(picture(panels, tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())
