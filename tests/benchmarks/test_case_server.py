"""Servers asked over pipes: answers, and whatever may go wrong with them."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from benchmarks.case_server import Server, ServerError, prompt, start_undisturbed

CHECKOUT = Path(__file__).resolve().parents[2]
BEGIN = """
import os, sys, time
from benchmarks.case_server import Answers, serve
answers = Answers()
print("not an answer")
os.system("echo not one either")
"""


@pytest.fixture
def start():
    """start(program) -> a server that runs it, closed at the end."""
    servers = []

    def start(program):
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
        servers.append(Server("peer", [sys.executable, "-c", BEGIN + program], environment))
        return servers[-1]

    yield start
    for server in servers:
        server.close(5.0)


def test_answers_in_order_and_what_else_is_printed_is_none(start):
    server = start("answers.send({'ready': 1})\nserve(answers, lambda r: {'twice': 2 * r['n'], 'long': 'x' * 200_000})")
    assert server.read(30) == {"ready": 1}
    for n in range(3):
        assert server.ask({"n": n}, 30) == {"twice": 2 * n, "long": "x" * 200_000}


def test_an_exception_is_told(start):
    server = start("serve(answers, lambda r: r['missing'])")
    with pytest.raises(ServerError, match="peer: KeyError: 'missing'"):
        server.ask({}, 30)


def test_a_server_that_has_gone_is_an_error(start):
    server = start("answers.send({'ready': 1})\nsys.exit(7)")
    assert server.read(30) == {"ready": 1}
    with pytest.raises(ServerError, match="peer: ended with status 7"):
        while True:
            server.ask({}, 30)


def test_no_answer_in_time_is_an_error(start):
    server = start("answers.send({'ready': 1})\nserve(answers, lambda r: time.sleep(60))")
    assert server.read(30) == {"ready": 1}
    with pytest.raises(ServerError, match="peer: no answer within 0 s"):
        server.ask({}, 0.1)
    server.close(0.1)  # ends it although it sleeps


def test_prompts_depend_on_everything_that_names_them():
    first = prompt(0, 5, 0, 0, 100)
    assert first == prompt(0, 5, 0, 0, 100) and len(first) == 5 and all(0 <= token < 100 for token in first)
    others = [prompt(1, 5, 0, 0, 100), prompt(0, 5, 1, 0, 100), prompt(0, 5, -1, 0, 100), prompt(0, 5, 0, 1, 100)]
    assert all(first != other for other in others)


def test_a_signal_waits_until_a_server_is_noted():
    seen, before = [], signal.signal(signal.SIGTERM, lambda *_: seen.append("told"))
    try:
        with start_undisturbed():
            signal.raise_signal(signal.SIGTERM)
            seen.append("noted")
        assert seen == ["noted", "told"]
        with start_undisturbed():
            pass
        assert seen == ["noted", "told"]
    finally:
        signal.signal(signal.SIGTERM, before)
