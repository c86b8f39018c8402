"""`verify_rolling` catches a planted fault of every kind it claims to prove absent."""

import pytest

from pipemoe.errors import PlanError
from pipemoe.rolling.admission import RollingSettings
from pipemoe.rolling.offer import MAX_CHUNKS, Chunk, Offer
from pipemoe.rolling.verify import Round, verify_rolling

SETTINGS = RollingSettings(max_tokens_per_round=100, max_round_rows=150, chunk_tokens=50, most_rounds_waited=4)
LEAVING = Round(0, (Offer(leaving=True),) * 2, ((), ()))
END = [LEAVING, LEAVING._replace(slot=1)]


def one(*chunks: Chunk, admitted: tuple[Chunk, ...] | None = None, slot: int = 1, other: Offer = Offer()) -> Round:
    """A round to which the first of two ranks offers these chunks."""
    return Round(slot, (Offer(chunks), other), (chunks if admitted is None else admitted, ()))


FIRST, SECOND = Chunk(0, 0, 50, 80), Chunk(0, 50, 80, 80)


def check(*rounds: Round, **more) -> None:
    verify_rolling(rounds, SETTINGS, 2, **more)


def test_a_sound_history():
    late = Chunk(1, 0, 20, 20)
    check(one(FIRST), one(SECOND, late, admitted=(SECOND,)), one(late._replace(age=1)), *END, is_complete=True)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([one(FIRST), one(FIRST)], "sequences go on: .* was at _Progress.at=50"),
        ([one(FIRST, FIRST, admitted=(FIRST,))], "offers a sequence twice"),
        ([one(SECOND)], "sequences go on"),
        ([one(FIRST), one(Chunk(0, 60, 80, 80))], "sequences go on"),
        ([one(FIRST), one(Chunk(0, 50, 90, 90))], "sequences go on"),
        ([one(FIRST), one(SECOND), one(SECOND)], "which has ended"),
        ([one(FIRST), one(SECOND, slot=0)], "slot 1's"),
        ([one(FIRST, admitted=()), one(FIRST)], "sequences go on"),
        ([one(FIRST, admitted=()), one(FIRST._replace(age=2))], "sequences go on"),
        ([one(FIRST), one(SECOND._replace(age=1))], "sequences go on"),
        ([one(FIRST), one()], "no longer offers sequence 0"),
        ([one(admitted=(FIRST,))], "admitted as offered: .* did not offer"),
        ([one(FIRST, admitted=(FIRST, FIRST))], "admitted twice"),
        ([one(FIRST, admitted=(FIRST._replace(stop=60),))], "admitted as offered"),
        ([one(FIRST, admitted=(FIRST._replace(start=10),))], "admitted as offered"),
        ([one(FIRST, admitted=(FIRST._replace(stop=0),))], "admitted as offered"),
        ([one(FIRST, admitted=(FIRST._replace(length=90),))], "admitted as offered"),
        ([one(FIRST, admitted=(FIRST._replace(stop=40),), slot=0)], "goes whole in this slot"),
        ([one(FIRST)._replace(admitted=((FIRST,),))], "1 ranks of 2"),
        ([one(*(Chunk(n, 0, 35, 35) for n in range(3)))], "within budgets: .* 105 tokens of rank 0"),
        ([one(*(Chunk(n, 0, 1, 1) for n in range(MAX_CHUNKS + 1)))], "21 chunks"),
        ([Round(1, (Offer((Chunk(0, 0, 80, 80),)),) * 2, ((Chunk(0, 0, 80, 80),),) * 2)], "160 rows, more than 150"),
        ([Round(1, (Offer((FIRST,), leaving=True),) * 2, ((), ()))], "leaves, and offers"),
        ([Round(0, (Offer(leaving=True), Offer()), ((), ())), Round(0, (Offer(), Offer()), ((), ()))], "comes back"),
        ([LEAVING, LEAVING], "after one in which all ranks left"),
    ],
)
def test_faults(rounds, words):
    with pytest.raises(PlanError, match=words):
        check(*rounds)


def test_who_waited_longest_must_go():
    old, younger = Chunk(0, 0, 20, 20), Chunk(1, 0, 20, 20)
    waits = [one(old, admitted=())]
    waits += [one(old._replace(age=n), younger._replace(age=n - 1), admitted=()) for n in range(1, 4)]
    now = old._replace(age=4), younger._replace(age=3)
    check(*waits, one(*now, admitted=now[:1]))
    with pytest.raises(PlanError, match="nobody starves: .* waited for 4 rounds"):
        check(*waits, one(*now, admitted=now[1:]))


def test_nobody_waits_longer_than_promised():
    bound = SETTINGS.longest_wait(2)
    ages = [Chunk(0, 0, 20, 20, age) for age in range(bound + 2)]
    with pytest.raises(PlanError, match="nobody starves"):
        check(*(one(c, admitted=()) for c in ages))


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([one(FIRST), *END], "no longer offers"),
        ([LEAVING], "only slots .0. of 2"),
    ],
)
def test_complete_histories_have_an_end(rounds, words):
    with pytest.raises(PlanError, match=words):
        check(*rounds, is_complete=True)


def test_a_cancelled_sequence_need_not_end():
    check(one(FIRST), *END, is_complete=True, cancelled=[(0, 0)])
