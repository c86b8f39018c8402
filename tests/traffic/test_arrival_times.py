"""When requests come: rates, order, repeatability, and what is refused."""

import math
from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipemoe.errors import InputError
from pipemoe.traffic.arrival_times import PROCESSES, arrivals_of, natural_rate
from pipemoe.traffic.request_trace import Request


def requests_at(*seconds):
    return [Request(1e3 * s, 10 + n, 1) for n, s in enumerate(seconds)]


def gaps(arrivals):
    return [b.seconds - a.seconds for a, b in zip(arrivals, arrivals[1:], strict=False)]


@given(
    process=st.sampled_from(list(PROCESSES)),
    count=st.integers(1, 40),
    rate=st.floats(1e-3, 1e4),
    seed=st.integers(0, 99),
)
def test_every_request_comes_once_in_order_and_the_same_for_everybody(process, count, rate, seed):
    requests = requests_at(*(n * n for n in range(count)))
    arrivals = arrivals_of(process, requests, rate, seed)
    assert [(a.number, a.num_tokens) for a in arrivals] == [(n, 10 + n) for n in range(count)]
    assert arrivals[0].seconds == 0 and all(gap >= 0 for gap in gaps(arrivals))
    assert arrivals == arrivals_of(process, requests, rate, seed)


def test_a_trace_keeps_its_own_rhythm():
    requests = requests_at(5, 6, 9)
    assert natural_rate(requests) == pytest.approx(0.5)
    assert [a.seconds for a in arrivals_of("trace", requests, 1.0)] == pytest.approx([0, 0.5, 2])
    assert [a.seconds for a in arrivals_of("trace", requests_at(3), 1.0)] == [0]


@pytest.mark.parametrize("process", ["poisson", "on_off"])
def test_random_arrivals_have_the_rate_and_follow_the_seed(process):
    requests = requests_at(*range(20_000))
    arrivals = arrivals_of(process, requests, 50.0, 1)
    assert arrivals[-1].seconds == pytest.approx(400, rel=0.1)
    assert arrivals != arrivals_of(process, requests, 50.0, 2)
    variation = pstdev(gaps(arrivals)) / fmean(gaps(arrivals))  # 1 in a Poisson process
    assert variation == pytest.approx(1, rel=0.1) if process == "poisson" else variation > 2


def test_at_an_infinite_rate_all_come_at_once():
    for process in PROCESSES:
        assert [a.seconds for a in arrivals_of(process, requests_at(1, 2, 3), math.inf)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("process", "requests", "rate", "wrong"),
    [
        ("burst", requests_at(1), 1.0, "must be one of trace, poisson, on_off"),
        ("trace", [], 1.0, "no requests"),
        ("trace", requests_at(1), 0.0, "a rate of 0.0"),
        ("poisson", requests_at(1), math.nan, "a rate of nan"),
    ],
)
def test_what_cannot_be_is_refused(process, requests, rate, wrong):
    with pytest.raises(InputError, match=wrong):
        arrivals_of(process, requests, rate)
