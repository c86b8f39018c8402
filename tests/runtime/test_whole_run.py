"""A run in one piece: its operations are done when its work is, and what fails is told as by Run."""

from types import SimpleNamespace

import pytest

from pipemoe import Config
from pipemoe.plan.planner import plan
from pipemoe.plan.schedule import Facts, ModelShape
from pipemoe.runtime import whole_run
from pipemoe.runtime.whole_run import WholeRun, is_one_piece


def plan_of(lengths, mode="broadcast", cap=64):
    config = Config(mode=mode, max_tokens_per_rank=100, moe_max_num_tokens=cap, num_slots=2)
    return plan(Facts(tuple(map(tuple, lengths))), ModelShape(16, 16, 8, 2, 3), config)


class Event:
    """Has passed after so many looks."""

    def __init__(self, looks, error=None):
        self.looks, self.error = looks, error

    def done(self):
        self.looks -= 1
        if self.looks < 0 and self.error:
            raise self.error
        return self.looks < 0

    def end(self):
        return 7.5


class Rank:
    def __init__(self, event, work=lambda: None, on_done=None):
        self.log, self.seconds, self.plan = [], [], plan_of([[5, 1]])
        lane = SimpleNamespace(submit=self.submit)
        lanes = SimpleNamespace(
            slots=[SimpleNamespace(compute=lane)], clock=SimpleNamespace(start=lambda timed: self.log.append("clock"))
        )
        source = SimpleNamespace(finished=lambda cohort, seconds: self.seconds.append((cohort, seconds)))
        self.event, self.made = event, 0
        self.run = WholeRun(
            self.plan, 0, lanes, None, None, None, None, source,
            work=work, on_done=on_done or self.log.append, on_progress_made=self.count,
            on_progress=lambda op: self.log.append(f"begins {op}"),
        )  # fmt: skip

    def submit(self, work, waits=(), timed=False):
        assert timed  # its end is a time to first token
        work()
        return self.event

    def count(self):
        self.made += 1


@pytest.mark.parametrize(
    ("lengths", "mode", "cap", "is_one"),
    [
        ([[5]], "broadcast", 64, True),
        ([[5, 40]], "pipelined", 64, True),
        ([[65]], "chunked", 64, False),  # two waves
        ([[30, 30]], "two_batch", 64, False),
        ([[5], [5]], "broadcast", 64, False),
        ([[]], "broadcast", 64, False),
    ],
)
def test_which_plans_are_one_piece(lengths, mode, cap, is_one):
    assert is_one_piece(plan_of(lengths, mode, cap)) == is_one


def test_all_is_done_when_the_work_is(monkeypatch):
    monkeypatch.setattr(whole_run, "SPIN_SECONDS", 0.0)  # one look each
    of = Rank(Event(looks=2))
    assert of.run.oldest() is None and of.run.own_finished == 0
    assert not of.run.advance() and not of.run.advance()
    assert of.run.oldest() == of.plan.ops[-1] and of.made == 0
    assert of.run.advance() and of.run.oldest() is None
    assert of.log == ["clock", f"begins {of.plan.ops[0]}", *of.plan.ops]
    assert (of.run.own_finished, of.run.num_own, of.made) == (1, 1, len(of.plan.ops))
    assert of.seconds == [(0, 7.5)] and of.run.failure is None and of.run.not_begun() is None
    assert of.run.advance() and of.made == len(of.plan.ops)  # told once
    assert of.run.issued_seconds > 0


def test_it_waits_by_itself():
    """Until the end, if that comes soon."""
    of = Rank(Event(looks=3))
    assert of.run.spins and of.run.advance()


def test_model_code_that_fails():
    error = ValueError("planted")

    def fails():
        raise error

    of = Rank(Event(looks=0), work=fails)
    assert of.run.advance()
    assert of.run.failure is error and of.run.own_finished == 1 and of.seconds == []
    assert of.run.failed_op is None  # the rank goes on


def test_a_callers_function_that_fails():
    error = ValueError("planted")
    seen = []

    def on_done(op):
        seen.append(op)
        if len(seen) == 2:
            raise error

    of = Rank(Event(looks=0), on_done=on_done)
    assert of.run.advance() and of.run.failure is error
    assert seen == list(of.plan.ops[:2]) and of.made == len(of.plan.ops)


def test_a_device_that_fails_is_told_with_an_operation():
    of = Rank(Event(looks=0, error=RuntimeError("CUDA driver error 719")))
    with pytest.raises(RuntimeError, match="719"):
        of.run.advance()
    assert of.run.failed_op == of.plan.ops[-1]


def test_a_launch_that_fails_is_told_with_an_operation():
    of = Rank(Event(looks=0))

    def fails(*arguments, **options):
        raise RuntimeError("CUDA driver error 2")

    of.run._lane = SimpleNamespace(submit=fails)
    with pytest.raises(RuntimeError, match="error 2"):
        of.run.advance()
    assert of.run.failed_op == of.plan.ops[0]
