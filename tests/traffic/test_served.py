"""Figures of served requests, and whether limits are met."""

import numpy as np
import pytest

from pipemoe.errors import InputError
from pipemoe.traffic.served import LengthClasses, Served, figures_of, length_classes, meets, ttft_curve_ms

CLASSES = LengthClasses(10, 100)


def request(number, tokens, ttft, arrival=0.0, waited=0.0):
    first = None if ttft is None else arrival + ttft
    return Served(number, 0, tokens, arrival, None if ttft is None else arrival + waited, first)


def test_half_of_the_prompts_are_short_and_a_tenth_long():
    assert length_classes(range(1, 101)) == LengthClasses(50, 90)
    assert [length_classes([7]).of(n) for n in (7, 8)] == ["short", "long"]
    assert length_classes([5, 5, 5, 90]).of(5) == "short"
    with pytest.raises(InputError, match="no requests"):
        length_classes([])


def test_figures():
    served = [request(n, 10, 0.001 * n, arrival=1.0, waited=0.0005 * n) for n in range(101)] + [request(101, 500, None)]
    figures = figures_of(served, CLASSES)
    assert figures["ttft_ms_p50"] == pytest.approx(50) == figures["ttft_ms_p50_short"]
    assert figures["ttft_ms_p95"] == pytest.approx(95) and figures["queueing_ms_p99"] == pytest.approx(49.5)
    assert figures["ttft_ms_p90_long"] is None and figures["ttft_ms_p90_medium"] is None
    assert (figures["requests"], figures["completed"]) == (102, 101)
    assert figures["duration_s"] == pytest.approx(1.1) and figures["tokens_per_s"] == pytest.approx(1010 / 1.1)
    assert ttft_curve_ms(served) == pytest.approx(range(101))


def test_figures_of_nothing_are_unknown():
    figures = figures_of([request(0, 5, None)], CLASSES)
    assert figures["ttft_ms_p50"] is figures["requests_per_s"] is None and figures["completed"] == 0
    assert ttft_curve_ms([]) == []


@pytest.mark.parametrize(("late", "met"), [(0, True), (1, True), (2, False)])
def test_five_percent_of_each_class_may_be_late(late, met):
    limits = {"short": 1.0, "medium": 2.0, "long": 3.0}
    short = [request(n, 10, 1.5 if n < late else 1.0) for n in range(20)]
    assert meets(short + [request(n, 500, 3.0) for n in range(400)], CLASSES, limits) is met
    assert not meets([*short, request(20, 50, None)], CLASSES, limits)  # its class has but this one


def test_percentiles_are_numpys():
    ttfts = np.random.default_rng(0).exponential(size=37)
    figures = figures_of([request(n, 5, t) for n, t in enumerate(ttfts)], CLASSES)
    for p in (50, 90, 95, 99):
        assert figures[f"ttft_ms_p{p}"] == pytest.approx(1e3 * np.percentile(ttfts, p))
