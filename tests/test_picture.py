"""docs/picture.py: bars and first tokens lie where the timelines say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

from pipemoe.plan.schedule import Op, OpKind
from pipemoe.trace import Span, Timeline, chrome_trace

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "picture.py"
LEFT, WIDTH = 150, 760


def picture_of(panels, tokens):
    spec = importlib.util.spec_from_file_location("picture", PICTURE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.picture(panels, tokens)


def step(*cohorts):
    """Per rank, (cohort, milliseconds of attention, end of its finish): attention, a transfer of 1 ms, finish."""
    timelines = []
    for of_rank in cohorts:
        spans = []
        for cohort, attend, end in of_rank:
            spans.append(Span(Op(OpKind.ATTEND, cohort, 0, 0), 0.0, attend / 1e3))
            spans.append(Span(Op(OpKind.DISPATCH, cohort, 0, 0), attend / 1e3, (attend + 1) / 1e3))
            spans.append(Span(Op(OpKind.FINISH, cohort, 1, 0), (end - 1) / 1e3, end / 1e3))
        timelines.append(Timeline(spans))
    return chrome_trace(timelines)


def test_a_first_token_stands_at_the_end_of_the_ranks_own_cohort():
    """Rank 1 takes part in the long cohort, but holds none of its tokens; rank 2 has none at all."""
    lockstep = step([(0, 50, 100)], [(0, 50, 100)], [(0, 0.01, 100)])
    cohorts = step([(0, 0.01, 20), (1, 60, 100)], [(0, 5, 20), (1, 0.01, 100)], [(0, 0.01, 20), (1, 0.01, 100)])
    text = picture_of([("Lockstep <all>", lockstep), ("cohorts", cohorts)], [4096, 16, 0])
    ElementTree.fromstring(text)
    assert "Lockstep &lt;all&gt;" in text and "rank 0, 4096 tokens" in text
    places = [float(x) - LEFT - 8 for x in re.findall(r'class="first" d="M([\d.]+) ', text)]
    assert [round(100 * place / WIDTH) for place in places] == [100, 100, 100, 20]
    assert re.findall(r'class="(c\d|all)"', text) == ["all"] * 3 + ["c0", "c1"] * 3
    assert len(re.findall(r'class="(?:c\d|all) moves"', text)) == 9
